"""Hosts on one machine: a network namespace each, joined by virtual cables whose speed can be limited.

Two hosts are joined by one veth pair, more by a bridge in a namespace of its own:

    host 0 [eth0]────[eth0] host 1            host 0 [eth0]──[port0]┐
                                              host 1 [eth0]──[port1]┼─ hub (bridge)
                                              host 2 [eth0]──[port2]┘

A limited link is limited in both directions by token buckets (``tc tbf``), which act where packets leave: ``eth0`` holds
back what its host sends, and where there is a hub, ``port`` holds back what its host receives. On a single cable the
other host's ``eth0`` does that. Needs Linux, root, and the commands ``ip`` and ``tc``; adds no delay.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["INTERFACE", "HostsError", "bits_per_second", "counters", "enter", "network", "sent_twice", "why_not"]

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000  # sched.h
_PR_SET_PDEATHSIG = 1  # sys/prctl.h

# A switch's buffer would overflow and drop; this one is deeper than what any benchmark has under way.
_QUEUE_BYTES = 64 * 2**20

# What an idle link lets through at once. Too little wastes CPU (large segments are cut up) and leaves the link idle
# whenever the kernel's timer is late; too much makes small messages free: 0.6 ms of the rate, at most 256 kB.
_BURST_SECONDS, _MIN_BURST, _MAX_BURST = 0.6e-3, 3_000, 256_000


class HostsError(RuntimeError):
    """Namespaces cannot be made here; the message says why and what helps."""


def why_not() -> str | None:
    """Return what keeps this machine from making hosts; ``None`` if nothing obvious does."""
    if sys.platform != "linux":
        return "network namespaces are Linux's: run it on Linux"
    if os.geteuid() != 0:
        return "making network namespaces needs root: run it as root, or in a container with `--privileged`"
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if missing:
        return f"the commands {missing} are missing (Debian: apt-get install iproute2)"
    return None


@contextmanager
def network(hosts: int, bits_per_second: float | None = None) -> Iterator[list[str]]:
    """Yield the names of connected namespaces; nothing of them is left afterwards, also after an error or Ctrl-C.

    Args:
        hosts: number of them, at least 2.
        bits_per_second: limit of each link in each direction; ``None``: as fast as the machine is.

    Raises:
        HostsError: if the machine cannot do that.
    """
    reason = why_not()
    if reason is not None:
        raise HostsError(f"Hosts cannot be made: {reason}.")
    tag = f"distopt-{os.getpid()}-{secrets.token_hex(3)}"
    names, hub = [f"{tag}-{rank}" for rank in range(hosts)], f"{tag}-hub"
    made: list[str] = []
    try:
        for name in [*names, hub][: hosts if hosts == 2 else None]:
            made.append(name)  # before it is made: what interrupts us in between must not leave it behind
            _run("ip", "netns", "add", name)
        _connect(names, hub)
        for rank, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"10.99.0.{rank + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            if bits_per_second is not None:
                _limit(name, INTERFACE, bits_per_second)
                if hosts > 2:
                    _limit(hub, f"port{rank}", bits_per_second)
        yield names
    finally:
        for name in made:  # a namespace takes its interfaces with it
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=10)


def bits_per_second(text: str) -> float | None:
    """Read a bandwidth; ``None`` for "unshaped".

    Raises:
        ValueError: if it is neither that nor a number with "kbit", "mbit" or "gbit".

    Example:
        >>> bits_per_second("100mbit")
        100000000.0
    """
    if text == "unshaped":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text)
    if match is None or not float(match[1]):
        raise ValueError(f"`bandwidth` must be like '100mbit', '1gbit' or 'unshaped': got {text!r}.")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def enter(names: Sequence[str], rank: int) -> None:
    """Move this process, which was forked and has one thread yet, into its rank's namespace; Gloo will use it.

    From here on the process leaves Ctrl-C to its parent, which ends it, and ends with its parent, however that ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(f"/var/run/netns/{names[rank]}") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def counters() -> tuple[int, int]:
    """Bytes that the interface of this process's namespace has sent and received, protocol headers included."""
    with open("/proc/self/net/dev") as file:
        for line in file:
            name, _, figures = line.partition(":")
            if name.strip() == INTERFACE:
                return int(figures.split()[8]), int(figures.split()[0])
    raise HostsError(f"This process's namespace has no interface `{INTERFACE}`: call `enter` first.")


def sent_twice() -> int:
    """Segments that TCP has sent again in this process's namespace."""
    with open("/proc/self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def _connect(names: Sequence[str], hub: str) -> None:
    if len(names) == 2:
        one, other = names
        _run("ip", "-n", one, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", other)
        return
    _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", hub, "link", "set", "bridge", "up")
    for rank, name in enumerate(names):
        port = f"port{rank}"
        _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
        _run("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")


def _limit(namespace: str, interface: str, bits_per_second: float) -> None:
    """Hold back what leaves through an interface."""
    burst = min(_MAX_BURST, max(_MIN_BURST, int(bits_per_second / 8 * _BURST_SECONDS)))
    _run(
        "tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf",
        "rate", f"{bits_per_second:.0f}bit", "burst", f"{burst}b", "limit", f"{_QUEUE_BYTES}b",
    )  # fmt: skip


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=10)
    except subprocess.CalledProcessError as error:
        raise HostsError(f"Hosts cannot be made: `{' '.join(words)}` says {error.stderr.strip()!r}.") from error
