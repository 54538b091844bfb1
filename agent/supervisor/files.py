"""The files of one instance, and what is read from them."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct
from sollol.errors import Reason, refuse

from agent.forwarder.status import draft_of

KEPT_LOGS = 50
_TAIL_BYTES = 64 * 1024
_SOCKET_PATH_BYTES = 107  # what the kernel takes, without the final NUL
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Directories(Struct, frozen=True, kw_only=True):
    """Where instances' files go. `run` should have a short path: sockets lie there."""

    log: Path
    run: Path
    state: Path

    @property
    def instances(self) -> Path:
        return self.state / "instances"

    def create(self) -> None:
        for path in (self.log, self.run, self.instances):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whoever can open a coordinator's socket can use it: the directory is the lock.
        self.run.chmod(0o700)


class InstanceFiles(Struct, frozen=True, kw_only=True):
    log: Path
    socket: Path
    stdin: Path
    progress: Path
    status: Path
    state: Path

    def remove_run_files(self) -> None:
        """Remove what only a running process needs; llama-server leaves its socket behind, and cannot bind again."""
        for path in (self.socket, self.stdin, self.progress, self.status, draft_of(self.status)):
            path.unlink(missing_ok=True)


def files_of(instance_id: str, directories: Directories) -> InstanceFiles:
    """Return the paths of an instance. The id, chosen by a caller, never becomes more than a plain file name.

    Raises:
        SollolError: ENGINE_START_FAILED when the socket's path would be longer than the kernel takes.
    """
    digest, name = _digest(instance_id), plain_name(instance_id)
    socket = directories.run / f"{digest}.sock"
    if len(os.fsencode(socket)) > _SOCKET_PATH_BYTES:
        raise refuse(
            Reason.ENGINE_START_FAILED,
            f"{socket} is too long for a unix socket; set run_dir to a shorter path",
            numbers={"path_bytes": len(os.fsencode(socket)), "limit_bytes": _SOCKET_PATH_BYTES},
        )
    return InstanceFiles(
        log=directories.log / f"{name}.log",
        socket=socket,
        stdin=directories.run / f"{digest}.stdin",
        progress=directories.run / f"{digest}.progress",
        status=directories.run / f"{digest}.status",
        state=directories.instances / f"{name}.json",
    )


def plain_name(instance_id: str) -> str:
    """The id itself where it is a plain file name, else a digest of it."""
    return instance_id if _SAFE_ID.fullmatch(instance_id) else _digest(instance_id)


def _digest(instance_id: str) -> str:
    return hashlib.sha256(instance_id.encode()).hexdigest()[:12]


def last_lines(log: Path, count: int) -> tuple[str, ...]:
    """Return up to `count` last lines, oldest first; none when there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ()
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return tuple(lines[-count:])


def remove_oldest_logs(directory: Path, *, keep: Iterable[Path]) -> None:
    """Leave `KEPT_LOGS` logs, the newest; those in `keep` belong to running engines and stay in any case."""
    running = set(keep)
    ended = [(_modified_ns(path), path) for path in directory.glob("*.log") if path not in running]
    for _, path in sorted(ended, reverse=True)[KEPT_LOGS:]:
        path.unlink(missing_ok=True)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # somebody tidied up, or it leads nowhere
        return 0


def keep_short(log: Path, most_bytes: int) -> None:
    """Start a long log anew with its last lines. Whoever writes it appends, and goes on behind them."""
    try:
        with log.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= most_bytes:
                return
            file.seek(max(0, size - _TAIL_BYTES))
            _, _, tail = file.read(_TAIL_BYTES).partition(b"\n")
            file.truncate(0)
        with log.open("ab") as file:
            file.write(b"(more than %d bytes: started anew with its last lines)\n" % most_bytes + tail)
    except OSError:
        return  # it is not there, or its disk fails: its engine shall not end for it
