"""Engines that a crashed agent left running: remembered in a file each, ended by the next agent.

A pid alone proves nothing, since the kernel uses it again; with the process's start time and the machine's boot id it
names one process for ever. Nothing else is ever signalled.
"""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import structlog
from msgspec import DecodeError, Struct, ValidationError, json

from agent.supervisor.files import Directories, InstanceFiles, files_of

log = structlog.get_logger(__name__)

_END_S = 5.0
_POLL_S = 0.02
_CORRUPT = ".corrupt"


class Identity(Struct, frozen=True, kw_only=True):
    """`started_ticks` counts clock ticks since boot, as in /proc/<pid>/stat."""

    instance_id: str
    pid: int
    started_ticks: int
    boot_id: str


def remember(instance_id: str, pid: int, files: InstanceFiles) -> None:
    """Write down who runs, in one step: a reader sees the whole file or none."""
    started = started_ticks(pid)
    if started is None:
        return  # it has ended already; its owner will say so
    identity = Identity(instance_id=instance_id, pid=pid, started_ticks=started, boot_id=boot_id())
    draft = files.state.with_suffix(".new")
    draft.write_bytes(json.encode(identity))
    draft.replace(files.state)


async def reap(directories: Directories) -> int:
    """End every remembered engine that still runs, and forget all. Returns how many ran.

    Call it before the first start, and with no other agent on the same directories.
    """
    ended = 0
    for path, identity in _remembered(directories.instances):
        if is_running(identity):
            await _end(identity)
            ended += 1
        files_of(identity.instance_id, directories).remove_run_files()
        path.unlink(missing_ok=True)
    return ended


def _remembered(directory: Path) -> list[tuple[Path, Identity]]:
    read = [(path, _read(path)) for path in sorted(directory.glob("*.json"))]
    return [(path, identity) for path, identity in read if identity is not None]


def is_running(identity: Identity) -> bool:
    return identity.boot_id == boot_id() and started_ticks(identity.pid) == identity.started_ticks


async def _end(identity: Identity) -> None:
    log.warning("leftover_engine_killed", pid=identity.pid)
    with contextlib.suppress(ProcessLookupError):  # it ended just now: all the better
        # We start engines as leaders of their groups; the group goes with them.
        os.killpg(identity.pid, signal.SIGKILL)
    deadline = asyncio.get_running_loop().time() + _END_S
    while is_running(identity):
        if asyncio.get_running_loop().time() > deadline:
            log.error("leftover_engine_not_gone", pid=identity.pid, waited_s=_END_S)
            return
        await asyncio.sleep(_POLL_S)


def _read(path: Path) -> Identity | None:
    """Return what the file says; one that says nothing is put aside, since a guess could end a stranger."""
    try:
        return json.decode(path.read_bytes(), type=Identity)
    except (DecodeError, ValidationError) as error:
        log.warning("instance_file_corrupt", path=str(path), error=str(error))
        path.replace(path.with_name(path.name + _CORRUPT))
        return None


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def started_ticks(pid: int) -> int | None:
    """Return when a process started; None when it is gone or a zombie, which holds nothing any more."""
    try:
        # The name, in parentheses, may itself hold parentheses and spaces.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(rest[18])
