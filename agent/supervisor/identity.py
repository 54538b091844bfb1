"""Which process is which. A pid alone proves nothing, since the kernel uses it again.

With the process's start time and the machine's boot id it names one process for ever. What we start also carries a
mark in its environment, so that it is found when no file tells of it.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

MARK = "SOLLOL_AGENT_STATE"
"""Its value is the state directory, which one agent at a time has."""


class Identity(Struct, frozen=True, kw_only=True):
    """`started_ticks` counts clock ticks since boot, as in /proc/<pid>/stat."""

    pid: int
    started_ticks: int
    boot_id: str


def identity_of(pid: int) -> Identity | None:
    """None when it has ended already."""
    started = started_ticks(pid)
    return None if started is None else Identity(pid=pid, started_ticks=started, boot_id=boot_id())


def is_running(identity: Identity) -> bool:
    return identity.boot_id == boot_id() and started_ticks(identity.pid) == identity.started_ticks


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def started_ticks(pid: int) -> int | None:
    """Return when a process started; None when it is gone or a zombie, which holds nothing any more."""
    try:
        state, *rest = stat_fields(Path(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(rest[18])


def stat_fields(path: Path) -> list[str]:
    """Return the fields of a process's or thread's `stat`, from its state on.

    The name before them is any bytes: parentheses, spaces, half a character where the kernel cut it.

    Raises:
        OSError: It is gone.
    """
    return path.read_text(errors="replace").rpartition(") ")[2].split()


def marked(environment: Mapping[str, str], state: Path) -> dict[str, str]:
    """The environment of a process of the agent with this state directory."""
    return {**environment, MARK: str(state)}


def with_mark(state: Path) -> Iterator[Identity]:
    """Every running group leader that an agent with this state directory started, now or earlier."""
    mark = f"{MARK}={state}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if mark in (entry / "environ").read_bytes().split(b"\0") and os.getpgid(pid) == pid:
                found = identity_of(pid)
                if found is not None:
                    yield found
