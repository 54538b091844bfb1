"""One engine process and its group: start it or find it running, wait for its end, end it."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import structlog

from agent.supervisor.command import EXIT_LINE
from agent.supervisor.files import InstanceFiles
from agent.supervisor.identity import Identity, identity_of, is_running, stat_fields

log = structlog.get_logger(__name__)

_GROUP_END_S = 2.0  # a killed process is gone in milliseconds, unless the kernel itself is stuck
_POLL_S = 0.01
_OOM_SCORE_ADJ = 300  # as if it took another 30 % of the node's memory
_HEARS_WITHIN_S = 0.5


class EngineProcess:
    """A running engine that leads its own session and group. Its owner must see it gone, or `let_go` of it.

    Args:
        pidfd: Of exactly this process.
        child: None when an earlier agent started it.
    """

    def __init__(self, pid: int, pidfd: int, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._pidfd, self._child = pidfd, child

    def identity(self) -> Identity | None:
        """None when it has ended already; its owner will say so."""
        return identity_of(self.pid)

    async def wait(self) -> int | None:
        """Return the exit status (minus the signal's number) once the process and all of its group are gone.

        Only its parent learns the status: None when that was an earlier agent.
        """
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
        exit_code = self._child.wait() if self._child is not None else None
        if _signal_group(self.pid, signal.SIGKILL):
            await self._until_group_is_gone()
        return exit_code

    async def _until_group_is_gone(self) -> None:
        deadline = asyncio.get_running_loop().time() + _GROUP_END_S
        while members := _running_members(self.pid):
            if asyncio.get_running_loop().time() > deadline:
                log.error("engine_group_not_gone", group=self.pid, members=members)
                return
            await asyncio.sleep(_POLL_S)

    async def stop(self, exited: "asyncio.Task[int | None]", grace_s: float) -> None:
        """Ask the engine to end, and after `grace_s` end its group by force. Returns when `exited` is done.

        It is asked twice: the first time llama-server ends its streams, which takes 0.1 s, or for ever where a client
        does not read; the second time it leaves.
        """
        if exited.done():
            return
        _say_exit(self.pid)
        for patience_s in (min(_HEARS_WITHIN_S, grace_s), max(0.0, grace_s - _HEARS_WITHIN_S)):
            if not exited.done():
                _signal_group(self.pid, signal.SIGTERM)
                await asyncio.wait({exited}, timeout=patience_s)
        if not exited.done():
            log.warning("engine_killed", pid=self.pid, grace_s=grace_s)
            _signal_group(self.pid, signal.SIGKILL)
            await asyncio.wait({exited})

    def kill(self) -> None:
        """End the whole group at once, without waiting. For the way out of a failing owner."""
        if self._pidfd >= 0 and self.identity() is not None:
            _signal_group(self.pid, signal.SIGKILL)

    def end_first(self) -> None:
        """Have the kernel end this one before others, its agent above all, when the node's memory runs out.

        It inherits the agent's place in that order. It may be raised by anybody, and is never lowered again.
        """
        try:
            Path(f"/proc/{self.pid}/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
        except OSError as error:  # it has ended already, or hides from its own user
            log.info("engine_not_to_end_first", pid=self.pid, problem=str(error))

    def let_go(self) -> None:
        """Nobody here waits for it any more. Safe to call again; nothing else is afterwards."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None and self._child.returncode is None:
            self._child.returncode = 0  # else Popen complains of a child that runs on, as this one shall


def find_running(identity: Identity) -> EngineProcess | None:
    """The process of that name; None when it has ended."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    if not is_running(identity):
        os.close(pidfd)
        return None
    return EngineProcess(identity.pid, pidfd)


def spawn_coordinator(argv: tuple[str, ...], environment: Mapping[str, str], files: InstanceFiles) -> EngineProcess:
    """Start an engine in its own session, so that it outlives us when it must and its group can be ended as one.

    Its output goes to files and never to a pipe: nobody needs to read for it to go on.

    Raises:
        OSError: The program is not there or cannot be run.
    """
    files.remove_run_files()
    stdin = _endless_fifo(files.stdin)
    try:
        with _new_file(files.progress) as stdout, _new_file(files.log) as stderr:
            process = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
                umask=0o077,
            )
    finally:
        os.close(stdin)
    return _watchable(process)


def spawn_server(
    argv: tuple[str, ...], environment: Mapping[str, str], files: InstanceFiles, *, told: bytes = b""
) -> EngineProcess:
    """Start a process as `spawn_coordinator` does; both of its outputs go to its log.

    All that it reads on its standard input is what it is `told`, a few bytes that are on no command line and no disk.

    It ignores SIGPIPE, as we do (Python's default would restore it): a backend that answers a client which has just
    left would otherwise die of it.

    Raises:
        OSError: The program is not there or cannot be run.
    """
    files.remove_run_files()
    with _new_file(files.log) as output, _whispered(told) as stdin:
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            umask=0o077,
            restore_signals=False,
        )
    return _watchable(process)


def _watchable(process: "subprocess.Popen[bytes]") -> EngineProcess:
    try:
        return EngineProcess(process.pid, os.pidfd_open(process.pid), process)
    except OSError:  # too many open files
        process.kill()
        process.wait()
        raise


@contextmanager
def _whispered(told: bytes) -> Iterator[int]:
    """A standard input with these bytes and nothing more; so few fit into a pipe before anybody reads."""
    if not told:
        yield subprocess.DEVNULL
        return
    reads, writes = os.pipe()
    try:
        os.write(writes, told)
        os.close(writes)
        yield reads
    finally:
        os.close(reads)


def _new_file(path: Path) -> BinaryIO:
    """Open an empty file for appending: whoever truncates a long log by hand then leaves no hole in it."""
    path.unlink(missing_ok=True)
    return path.open("ab")


def _endless_fifo(path: Path) -> int:
    """Return a standard input that never ends, even when we do: the child holds its other end itself.

    It must block: the child shares our file's flags, and takes "nothing to read now" for the end.
    """
    os.mkfifo(path, 0o600)
    try:
        return os.open(path, os.O_RDWR)
    finally:
        path.unlink()


def _say_exit(pid: int) -> None:
    """Write the line that ends a served engine: in child mode SIGTERM alone lets it wait for its standard input."""
    try:
        stdin = os.open(f"/proc/{pid}/fd/0", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # it has just ended, or reads from nowhere
        return
    try:
        os.write(stdin, EXIT_LINE)
    except OSError as error:
        log.info("engine_takes_no_line", pid=pid, error=str(error))
    finally:
        os.close(stdin)


def bytes_read(pid: int) -> int:
    """Return what a process has read so far, from disk and from cache; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ", 1) for line in lines)
    return int(counts.get("rchar", 0)) + int(counts.get("read_bytes", 0))


def _signal_group(group: int, number: signal.Signals) -> bool:
    """Return whether there was a process to send it to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _running_members(group: int) -> list[int]:
    """Return the group's processes that still hold memory; a zombie holds none and only waits for its parent."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, its_group = stat_fields(entry / "stat")[:3]
        except OSError:
            continue  # it has just ended
        if int(its_group) == group and state not in "ZX":
            members.append(int(entry.name))
    return members
