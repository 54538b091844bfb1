"""Asks an engine binary a question: runs it once, bounded, and returns what it said."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping

from msgspec import Struct

LONGEST_S = 10.0  # CUDA alone may take seconds to wake its devices; a binary that needs longer is of no use


class Answer(Struct, frozen=True):
    """`status` is the exit status, negative for a signal, None when it could not be run or did not end in time."""

    status: int | None
    output: str = ""
    errors: str = ""

    @property
    def last_line(self) -> str:
        """The last thing it said; llama.cpp puts its complaint there."""
        lines = (self.errors.strip() or self.output.strip()).splitlines()
        return lines[-1].strip() if lines else ""

    @property
    def trouble(self) -> str:
        """Why the answer cannot be used, in words."""
        if self.status is None:
            return self.last_line or "did not answer"
        return f"exit status {self.status}: {self.last_line}" if self.last_line else f"exit status {self.status}"


async def ask(argv: tuple[str, ...], environment: Mapping[str, str], *, within_s: float = LONGEST_S) -> Answer:
    """Run `argv` to its end, or kill its group after `within_s` seconds. Never raises for what the binary does."""
    try:
        process = await start(argv, environment, errors=asyncio.subprocess.PIPE)
    except OSError as error:
        return Answer(None, errors=f"cannot be run: {error.strerror}")
    try:
        async with asyncio.timeout(within_s):
            output, errors = await process.communicate()
    except TimeoutError:
        return Answer(None, errors=f"gave no answer within {within_s:g} s")
    finally:
        await end_group(process)
    return Answer(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


async def start(argv: tuple[str, ...], environment: Mapping[str, str], *, errors: int) -> asyncio.subprocess.Process:
    """Start `argv` in a session of its own, its output in a pipe.

    When we are cancelled meanwhile it is ended with its children: asyncio would end it alone.

    Raises:
        OSError: it cannot be run.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            await end_group(await starting)
        raise


async def end_group(process: asyncio.subprocess.Process, *, grace_s: float = 0.0) -> None:
    """End a child started in its own session, and its children: TERM, `grace_s` seconds, KILL.

    Those that it has left behind end too, when it has ended by itself.
    """
    if grace_s and process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):  # it had its chance
            async with asyncio.timeout(grace_s):
                await process.wait()
    _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(pid, number)
