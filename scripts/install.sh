#!/usr/bin/env bash
# Makes .venv and installs the package into it, editable, with the extras `all` and `dev`.
# Does nothing when neither pyproject.toml, this script nor the Python has changed since the last time.
#
#   PYTHON=/path/to/python3.12 scripts/install.sh     use that Python instead of the first suitable one on PATH
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH="torch==2.13.0"  # spelt so on purpose: on machines without a GPU a bare `torch` may bring gigabytes of CUDA packages
readonly VENV=".venv"
readonly STAMP="$VENV/.shardwise-installed"
readonly HAS_PYTHON='import sys; sys.exit(sys.version_info < (3, 11))'
readonly PACKAGES='import sysconfig; print(sysconfig.get_path("purelib"))'
readonly IN_VENV='import sys; sys.exit(sys.prefix == sys.base_prefix)'
readonly HAS_TORCH='import sys, torch; sys.exit(tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2] if p.isdigit()) < (2, 13))'

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }
quietly() { "$@" >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [[ -n "$candidate" ]] && quietly "$candidate" -c "$HAS_PYTHON"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found (looked for \$PYTHON, python3, python3.13, python3.12, python3.11, python). Install one, or set PYTHON=/path/to/python."
}

make_venv() {
    local python=$1 options=() shared=""
    if quietly "$python" -c "$HAS_TORCH"; then
        shared=$("$python" -c "$PACKAGES")
        options=(--system-site-packages)
        say "$python has a suitable torch: using it as it is"
    fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv ${options[@]+"${options[@]}"} "$VENV" \
        || die "could not make $VENV: on Debian and Ubuntu 'apt-get install python3-venv' is the usual cure."
    if [[ -n "$shared" ]] && quietly "$python" -c "$IN_VENV"; then  # then its packages are not the system's
        printf '%s\n' "$shared" >"$("$VENV/bin/python" -c "$PACKAGES")/shared-packages.pth"
    fi
}

install_torch() {
    if quietly "$VENV/bin/python" -c "$HAS_TORCH"; then
        return
    fi
    say "installing $TORCH"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH" || die "pip could not install $TORCH (see above)."
}

install_package() {
    say "installing shardwise and its dependencies"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[all,dev]" \
        || die "pip could not install the dependencies in pyproject.toml (see above)."
}

fingerprint() {
    cat pyproject.toml scripts/install.sh
    pwd -P
    "$VENV/bin/python" --version
}

export PIP_ROOT_USER_ACTION=ignore
if [[ -x "$VENV/bin/python" && -f "$STAMP" ]] && [[ "$(fingerprint | cksum)" == "$(cat "$STAMP")" ]]; then
    exit 0
fi
if ! quietly "$VENV/bin/python" -c "$HAS_PYTHON"; then
    python=$(find_python)  # not inside an argument: a failure there would not end the script
    make_venv "$python"
fi
install_torch
install_package
fingerprint | cksum >"$STAMP"
say "done"
