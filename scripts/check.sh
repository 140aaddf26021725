#!/usr/bin/env bash
# check.sh all | fast: format, lint, types, tests; `fast` leaves out tests marked slow. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PY=".venv/bin/python"

run() {
    local name=$1 start=$SECONDS
    shift
    printf '== %s\n' "$name"
    "$@" || { printf '== %s failed (%s)\n' "$name" "$*" >&2; exit 1; }
    printf '== %s ok, %d s\n' "$name" "$((SECONDS - start))"
}

case "${1:-all}" in
    all) select=() ;;
    fast) select=(-m "not slow") ;;
    *) printf 'check.sh: %s is neither "all" nor "fast"\n' "$1" >&2; exit 2 ;;
esac

run format "$PY" -m ruff format --check .
run lint "$PY" -m ruff check .
run types "$PY" -m mypy
run tests "$PY" -m pytest -q --numprocesses 2 --dist worksteal ${select[@]+"${select[@]}"}
