"""Runs the programs of a build one after another: into one log, line by line, with a bound on silence."""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from sollol.errors import Reason, refuse

from agent.engine.ask import end_group, start

_TAIL_LINES = 30
_SILENCE_S = 1800.0  # pip says nothing while it downloads, and one file may take minutes on a small board
_GRACE_S = 5.0
_READ = 1 << 16
_LONGEST_LINE = 1 << 16
_COUNTED = re.compile(r"^\[(\d+)/(\d+)\]")


class Steps:
    """One build's programs. `on_count` hears of each `[k/n]` that ninja prints."""

    def __init__(self, log: Path, environment: Mapping[str, str], on_count: Callable[[int, int], None]) -> None:
        self._log = log
        self._on_count = on_count
        # Ours, in case the user has set another: progress is read from it.
        self._environment = {**environment, "NINJA_STATUS": "[%f/%t] "}
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    async def run(self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None) -> None:
        """Run `argv` to its end. When we are cancelled it is ended first.

        Raises:
            SollolError: ENGINE_MISSING with the last log lines, when it fails, is missing or hangs.
        """
        self._tail.clear()
        try:
            process = await start(argv, {**self._environment, **(environment or {})}, errors=asyncio.subprocess.STDOUT)
        except OSError as error:
            raise self._failed(argv, f"cannot be run: {error.strerror}") from error
        try:
            await self._follow(process)
        except TimeoutError as error:
            raise self._failed(argv, f"said nothing for {_SILENCE_S:g} s") from error
        finally:
            await end_group(process, grace_s=_GRACE_S)
        if process.returncode != 0:
            raise self._failed(argv, f"ended with status {process.returncode}")

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Copy the output to the log until it ends. A file may wait: nothing else happens in a build's process."""
        assert process.stdout is not None
        unfinished = ""
        with self._log.open("ab") as log:
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    chunk = await process.stdout.read(_READ)
                if not chunk:
                    break
                log.write(chunk)
                log.flush()
                *lines, unfinished = (unfinished + chunk.decode(errors="replace")).split("\n")
                unfinished = unfinished[-_LONGEST_LINE:]
                for line in lines:
                    self._heard(line)
            if unfinished:
                self._heard(unfinished)
        async with asyncio.timeout(_SILENCE_S):
            await process.wait()

    def _heard(self, line: str) -> None:
        self._tail.append(line.rstrip())
        if counted := _COUNTED.match(line):
            self._on_count(int(counted[1]), int(counted[2]))

    def _failed(self, argv: tuple[str, ...], why: str) -> Exception:
        program = Path(argv[0]).name + (f" -m {argv[2]}" if argv[1:2] == ("-m",) else "")
        return refuse(
            Reason.ENGINE_MISSING,
            f"the engine could not be built: {program} {why}; the whole log is {self._log}",
            log_lines=tuple(self._tail),
        )
