"""Two hosts on one machine: network namespaces of Linux, joined by a pair of virtual Ethernet devices whose rate can be set.

    host 0 (10.77.N.1) ── veth ══ token bucket (tc-tbf) ══ veth ── host 1 (10.77.N.2)

Each has its own network, loopback included, and no other way to the other one; processors and memory they share. Needs root, and `ip` and
`tc` (Debian's iproute2). Whatever happens, the namespaces are removed at the end, and with them the devices.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

_BURST_BYTES = 1 << 17
_QUEUE = "100ms"
_MOMENT_S = 20.0
_NUMBERS = itertools.count()
_MEASURED_BYTES = 1 << 28
_MESSAGES = 3
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000  # linux/sched.h

_RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
peer, _ = server.accept()
buffer, total = bytearray(1 << 20), 0
count = peer.recv_into(buffer)
start = time.perf_counter()
while count:
    total += count
    count = peer.recv_into(buffer)
print(total / (time.perf_counter() - start))
"""
_SEND = """
import socket, sys, time
for _ in range(200):
    try:
        peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        break
    except OSError:
        time.sleep(0.02)
chunk = bytes(1 << 20)
for _ in range(int(sys.argv[3]) >> 20):
    peer.sendall(chunk)
peer.close()
"""


def why_not() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts on one machine need root on Linux"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"two hosts on one machine need `{program}` (Debian's iproute2)"
    try:
        with Hosts() as hosts:
            hosts.shape(1e8)
    except subprocess.CalledProcessError as error:
        return f"this system lets nobody make hosts: `{' '.join(error.cmd)}`: {error.stderr.strip()}"
    return None


class Hosts:
    """A context; `addresses` of the two."""

    def __init__(self) -> None:
        number, own = os.getpid() % 250, f"{os.getpid()}-{next(_NUMBERS)}"
        self.names = [f"shardwise-{own}-{host}" for host in range(2)]
        self.devices = [f"sw{own}-{host}" for host in range(2)]  # 15 characters are the most
        self.addresses = [f"10.77.{number}.{host + 1}" for host in range(2)]
        self._running: list[subprocess.Popen[str]] = []
        self._outputs: dict[int, IO[str]] = {}

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                _call("ip", "netns", "add", name)
            ends = [[self.devices[host], "netns", self.names[host]] for host in range(2)]
            _call("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for host in range(2):
                self._ip(host, "addr", "add", f"{self.addresses[host]}/24", "dev", self.devices[host])
                self._ip(host, "link", "set", self.devices[host], "up")
                self._ip(host, "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Ends what runs on the hosts, and removes them."""
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def shape(self, bytes_per_s: float | None) -> None:
        """The link's rate, in each direction; None: as fast as the machine."""
        for host in range(2):
            on = ["ip", "netns", "exec", self.names[host], "tc", "qdisc"]
            if bytes_per_s is None:
                subprocess.run([*on, "del", "dev", self.devices[host], "root"], capture_output=True, check=False)
            else:
                rate = f"{bytes_per_s * 8:.0f}bit"
                _call(*on, "replace", "dev", self.devices[host], "root", "tbf", "rate", rate, "burst", str(_BURST_BYTES), "latency", _QUEUE)

    def start(self, host: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A process on a host, in a process group of its own; it ends with this one. Its output goes to a file (`output_of`)."""
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads meanwhile would stop the process
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=_alone,
        )
        self._running.append(process)
        self._outputs[process.pid] = output
        return process

    def output_of(self, process: subprocess.Popen[str]) -> str:
        """What a process has said so far."""
        output = self._outputs[process.pid]
        output.seek(0)
        return output.read()

    def measured_bytes_per_s(self, nbytes: int = _MEASURED_BYTES, port: int = 29400) -> float:
        """What one TCP connection from host 0 to host 1 reaches, the best of a few: a busy processor makes a link seem slower."""
        return max(self._reached_bytes_per_s(nbytes, port) for _ in range(_MESSAGES))

    def _reached_bytes_per_s(self, nbytes: int, port: int) -> float:
        where = [self.addresses[1], str(port)]
        receiver = self.start(1, [sys.executable, "-c", _RECEIVE, *where])
        sender = self.start(0, [sys.executable, "-c", _SEND, *where, str(nbytes)])
        self.finished([sender, receiver], 120)
        return float(self.output_of(receiver))

    def torchrun(self, ranks: int, arguments: Sequence[str], *, port: int = 29500, **environment: str) -> list[subprocess.Popen[str]]:
        """`torchrun` on both hosts, so many ranks on each; arguments: what each rank runs."""
        common = ["--nnodes", "2", "--nproc-per-node", str(ranks), "--master-addr", self.addresses[0], "--master-port", str(port)]
        own = {"OMP_NUM_THREADS": "1", **environment}
        return [
            self.start(host, [sys.executable, "-m", "torch.distributed.run", "--node-rank", str(host), *common, *arguments], **own)
            for host in range(2)
        ]

    def finished(self, processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[tuple[int, str]]:
        """Each process' exit code and output. As soon as one fails, the others have a moment only.

        Raises RuntimeError with what they said where they do not end in time.
        """
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + _MOMENT_S)
            if time.monotonic() > deadline:
                said = "\n".join(self.output_of(process) for process in processes)
                raise RuntimeError(f"processes on hosts did not end within {timeout_s:g} s:\n{said}")
            time.sleep(0.1)
        return [(process.returncode, self.output_of(process)) for process in processes]

    def _ip(self, host: int, *arguments: str) -> None:
        _call("ip", "-n", self.names[host], *arguments)


def enter(namespace: str) -> None:
    """Move the thread that calls, and all that it starts from now on, into a host's network."""
    with open(f"/run/netns/{namespace}") as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), opened.name)


def _alone() -> None:
    """Its own process group, and killed when this process ends."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
