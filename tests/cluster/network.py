"""Hosts in network namespaces, each with one address on a common bridge; links that are slow or down, lost packets.

The bridge lies in a namespace of its own: nothing of the machine's own network is touched, and no packet leaves it.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX_BITS = 24


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """One namespace, named by its address; `port` is where its cable is plugged in, in the namespace `switch`."""

    address: str
    namespace: str
    switch: str
    port: str

    def argv(self, *command: str) -> tuple[str, ...]:
        """`command` as it has to be started to run on this host."""
        return ("ip", "netns", "exec", self.namespace, *command)

    def run(self, *command: str, timeout_s: float = 60.0, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*command), capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )

    def spawn(self, *command: str, log: Path, environ: dict[str, str]) -> "subprocess.Popen[bytes]":
        with log.open("ab") as out:
            return subprocess.Popen(
                self.argv(*command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **environ},
                start_new_session=True,
            )

    def link_down(self) -> None:
        """Pull the cable: packets vanish both ways, connections stay half-open."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def link_up(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def slow_down(self, bits_per_s: int) -> None:
        """From now on its cable carries no more than this, each way."""
        limit = ("root", "tbf", "rate", f"{bits_per_s}bit", "burst", "16kb", "latency", "400ms")
        for namespace, device in ((self.namespace, "eth0"), (self.switch, self.port)):
            subprocess.run(
                ("tc", "-n", namespace, "qdisc", "replace", "dev", device, *limit), check=True, capture_output=True
            )

    def drop_from(self, source: str) -> None:
        """Lose every packet that arrives from `source`; the other way still works."""
        rules = (
            "add table inet loss; add chain inet loss input { type filter hook input priority 0; };"
            f"add rule inet loss input ip saddr {source} drop"
        )
        subprocess.run(self.argv("nft", rules), check=True, capture_output=True)

    def drop_nothing(self) -> None:
        subprocess.run(self.argv("nft", "delete table inet loss"), check=False, capture_output=True)


@contextlib.contextmanager
def network(addresses: Sequence[str]) -> Iterator[tuple[Host, ...]]:
    """Yield one host per address, all on one bridge; everything is gone afterwards, processes included."""
    name = f"sollol-{os.getpid()}"
    switch = f"{name}-switch"
    hosts = tuple(
        Host(address, f"{name}-{address.rsplit('.', 1)[1]}", switch, f"port{number}")
        for number, address in enumerate(addresses)
    )
    namespaces = (switch, *(host.namespace for host in hosts))
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            _plug_in(host)
        yield hosts
    finally:
        for namespace in namespaces:
            _end_processes(namespace)
            subprocess.run(("ip", "netns", "delete", namespace), check=False, capture_output=True)


def _plug_in(host: Host) -> None:
    _ip("netns", "add", host.namespace)
    _ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", host.port, "netns", host.switch)
    _ip("-n", host.switch, "link", "set", host.port, "master", "bridge", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/{PREFIX_BITS}", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")
    _ip("-n", host.namespace, "link", "set", "lo", "up")


def processes_in(namespace: str) -> tuple[int, ...]:
    found = subprocess.run(("ip", "netns", "pids", namespace), capture_output=True, text=True, check=False)
    return tuple(int(pid) for pid in found.stdout.split())


def _end_processes(namespace: str) -> None:
    for pid in processes_in(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
