"""The daemons that `sollol up` starts: each with its own log file and a pipe that ends when we do."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

TAIL_LINES = 15
READ_AT_MOST = 64 << 10


class Child:
    """One daemon. It runs in its own session, so that Ctrl-C reaches it only through us, in order.

    Its standard input is a pipe that we never write to: with `exit_with_parent` it ends when that closes, which the
    kernel does even when we are killed.
    """

    def __init__(self, name: str, process: Process, log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        self._process = process
        self._shown = 0  # bytes of the log that were looked at

    @classmethod
    async def start(
        cls, name: str, module: str, flags: Sequence[str], log_file: Path, environ: Mapping[str, str]
    ) -> "Child":
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, *flags),  # -P: nothing in the working directory is imported
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **environ},
            )
        return cls(name, process, log_file)

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, *, within_s: float) -> bool:
        """TERM, a bounded wait, then KILL of the whole session. False when it had to be killed."""
        if self.ended:
            return True
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), within_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False
        return True

    def kill(self) -> None:
        if not self.ended:
            os.killpg(self._process.pid, signal.SIGKILL)

    def new_lines(self) -> list[str]:
        """Whole log lines written since the last call."""
        with self.log_file.open("rb") as log:
            log.seek(self._shown)
            text = log.read(READ_AT_MOST)
        whole = text.rfind(b"\n") + 1
        if not whole and len(text) == READ_AT_MOST:
            whole = len(text)  # one endless line: better cut than stuck
        self._shown += whole
        return text[:whole].decode(errors="replace").splitlines()

    def last_lines(self) -> list[str]:
        with self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - READ_AT_MOST))
            return [readable(line) for line in log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]]


def readable(line: str) -> str:
    """A JSON log line as `event key=value ...`; any other line as it is."""
    fields = _fields(line)
    if fields is None:
        return line
    event = str(fields.pop("event", ""))
    for noise in ("timestamp", "logger", "level"):
        fields.pop(noise, None)
    trace = fields.pop("exception", None)
    text = " ".join([event, *(f"{name}={value}" for name, value in fields.items())])
    return f"{text}\n{trace}" if trace else text


def is_error(line: str) -> bool:
    """Whether a log line says that something is wrong; lines that are no JSON come from a crash."""
    fields = _fields(line)
    return bool(line.strip()) if fields is None else fields.get("level") in ("error", "critical")


def _fields(line: str) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError:
        return None
