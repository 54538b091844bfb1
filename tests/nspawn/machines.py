"""Machines that boot: containers of systemd-nspawn, each in a network namespace with one address on a common bridge.

nspawn registers them nowhere (`--register=no`), so it needs no systemd on the host; what they write is in memory.
"""

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.network import Host, network, processes_in
from tests.cluster.seed import await_true
from tests.nspawn.booted import CLEAN, UP, Booted

BOOTED_WITHIN_S = 40.0
OFF_WITHIN_S = 20.0
# The hierarchies by which systemd knows processes; which of them there are is the host's choice.
CGROUPS = tuple(map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")))
_POWER_OFF = signal.SIGRTMIN + 4  # systemd(1)


@dataclass(frozen=True)
class Machine(Booted):
    """A container. `leader` is the pid, out here, of its process 1."""

    host: Host
    leader: int

    @property
    def address(self) -> str:
        return self.host.address

    def argv(self, *command: str) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.leader), "--all", *CLEAN, *command)

    def pids_of(self, user: str) -> list[int]:
        """Every process of a user there, by its pid out here."""
        uid = int(self.must("id", "-u", user))
        return [pid for pid in processes_in(self.host.namespace) if _uid_of(pid) == uid]


def _uid_of(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except FileNotFoundError:
        return -1


def command_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    return ""


@contextlib.contextmanager
def overlay(root: Path, directory: Path) -> Iterator[Path]:
    """`root` as it is, to be added to: what is written stays in memory, and is gone afterwards."""
    memory, merged = directory / "memory", directory / "root"
    memory.mkdir()
    merged.mkdir()
    _mount("-t", "tmpfs", "tmpfs", str(memory))
    try:
        (memory / "upper").mkdir(mode=0o755)
        (memory / "work").mkdir()
        layers = f"lowerdir={root},upperdir={memory}/upper,workdir={memory}/work"
        _mount("-t", "overlay", "overlay", "-o", layers, str(merged))
        try:
            yield merged
        finally:
            _unmount(merged)
    finally:
        _unmount(memory)


@contextlib.contextmanager
def booted(root: Path, addresses: Sequence[str], logs: Path) -> Iterator[Mapping[str, Machine]]:
    """Boot one machine per address, all from `root`, and yield them once they are up. They are gone afterwards."""
    with network(addresses) as hosts, contextlib.ExitStack() as running:
        nspawns = [running.enter_context(_nspawn(host, root, logs / f"{host.namespace}.console")) for host in hosts]
        machines = [Machine(host, _leader(host, nspawn)) for host, nspawn in zip(hosts, nspawns, strict=True)]
        for machine in machines:
            running.callback(_power_off, machine)  # all at once, before any is waited for
            await_true(lambda machine=machine: _is_up(machine), BOOTED_WITHIN_S, f"{machine.address} is up")
        yield {machine.address: machine for machine in machines}


@contextlib.contextmanager
def _nspawn(host: Host, root: Path, console: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with _own_cgroups(host.namespace) as enter, console.open("wb") as out:
        process = subprocess.Popen(
            (
                *enter,
                *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe"),
                *("--volatile=overlay", f"--directory={root}", f"--machine={host.namespace}"),
                f"--network-namespace-path=/run/netns/{host.namespace}",
            ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            try:
                process.wait(OFF_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _own_cgroups(name: str) -> Iterator[tuple[str, ...]]:
    """Yield how a command line begins that shall run in cgroups of its own: machines that share theirs end each other's."""
    folders = [root / name for root in CGROUPS if (root / "cgroup.procs").exists()]
    for folder in folders:
        folder.mkdir()
    try:
        procs = " ".join(shlex.quote(str(folder / "cgroup.procs")) for folder in folders)
        yield ("sh", "-c", f'for procs in {procs}; do echo $$ >"$procs"; done; exec "$@"', "sh")
    finally:
        for folder in folders:
            for inner, _, _ in os.walk(folder, topdown=False):
                Path(inner).rmdir()


def _leader(host: Host, nspawn: "subprocess.Popen[bytes]") -> int:
    found: list[int] = []

    def looked() -> list[int]:
        assert nspawn.poll() is None, f"nspawn has ended: {nspawn.returncode}"
        found[:] = [pid for pid in processes_in(host.namespace) if _is_process_1(pid)]
        return found

    await_true(looked, BOOTED_WITHIN_S, f"{host.address} boots")
    return found[0]


def _is_process_1(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(line.split()[2:] == ["1"] for line in status.splitlines() if line.startswith("NSpid:"))


def _is_up(machine: Machine) -> bool:
    return machine.run("systemctl", "is-system-running").stdout.strip() in UP


def _power_off(machine: Machine) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(machine.leader, _POWER_OFF)


def _mount(*words: str) -> None:
    subprocess.run(("mount", *words), check=True, capture_output=True)


def _unmount(path: Path) -> None:
    subprocess.run(("umount", "--lazy", str(path)), check=True, capture_output=True)
