"""A daemon from start to exit status: signals, ordered bounded shutdown, systemd's notices.

The first SIGINT or SIGTERM asks for a graceful stop, the second one leaves at once. SIGHUP asks for a reload, or for a
stop where it means that the terminal is closed.
"""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import structlog

from sollol.errors import SURFACES, Reason, SollolError, refuse
from sollol.notices import Notices
from sollol.pulse import pulse

log = structlog.get_logger(__name__)

# After `main` has returned: what asyncio's own clean-up (left tasks, threads of the executor) may take.
_LEAVE_WITHIN_S = 5.0
_PULSE_END_S = 1.0
_STDIN = 0


class UncleanStop(Exception):  # noqa: N818 - it reads as the fact it is
    """Raised when closing steps failed or overran their bound; the exit status is then not 0."""


class Stop:
    """The one place where "please stop" is asked and awaited. Asking again changes nothing; the first cause stays.

    Whoever runs the daemon hears from it by `notices`: when it serves, what it does, that it reloads.
    """

    def __init__(self, notices: Notices | None = None, reload: Callable[[], None] | None = None) -> None:
        self._event = asyncio.Event()
        self._notices = notices or Notices()
        self._reload = reload
        self._ready = False
        self._status: Callable[[], str] = lambda: "starting"
        self.cause = ""

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, cause: str) -> None:
        if not self.requested:
            self.cause = cause
            log.info("stop_requested", cause=cause)
            self._notices.stopping()
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()

    def announce_ready(self, status: Callable[[], str] = lambda: "") -> None:
        """The daemon serves. From now on `status` is asked, every few seconds, for a line about what it does."""
        self._status, self._ready = status, True
        self._notices.status(self.status())
        self._notices.ready()

    def status(self) -> str:
        return f"stopping ({self.cause}): {self._status()}" if self.requested else self._status()

    def reload(self) -> None:
        """Reload, when the daemon serves; what is refused leaves it as it was."""
        if self._reload is None or not self._ready or self.requested:
            log.warning("reload_ignored", why="not now: starting, stopping, or nothing that could be reloaded")
            return
        self._notices.reloading()
        try:
            self._reload()
        except SollolError as error:
            log.error("reload_refused", reason=error.refusal.reason, message=error.refusal.message)  # noqa: TRY400 - expected
        finally:
            self._notices.ready()


class _Step(NamedTuple):
    name: str
    close: Callable[[], Awaitable[object]]
    within_s: float


class Closing:
    """Closing steps, run on leaving the block, last added first, each within its own bound.

    Those of one `group` run at the same time, where its newest one stands. A step that fails or overruns is logged and
    left, and the next one runs; leaving the block then raises UncleanStop unless another exception is on its way.
    """

    def __init__(self) -> None:
        # Of steps that run together; one of its own is one. The order is that of each group's newest step.
        self._groups: dict[object, list[_Step]] = {}

    def add(self, name: str, close: Callable[[], Awaitable[object]], *, within_s: float, group: str = "") -> None:
        key = group or object()
        self._groups[key] = [*self._groups.pop(key, []), _Step(name, close, within_s)]

    def run(self, name: str, work: Coroutine[Any, Any, None], stop: Stop, *, within_s: float) -> None:
        """Start `work` as a task that lives until its closing step.

        When it ends earlier, however it ends, the daemon stops, and uncleanly: it would go on without a part of itself.
        """
        task = asyncio.create_task(work, name=name)
        early = closing = False

        def ended(task: asyncio.Task[None]) -> None:
            nonlocal early
            if closing:
                return
            early = True
            log.error("task_ended_early", task=name, exc_info=None if task.cancelled() else task.exception())
            stop.request(f"{name} ended")

        async def close() -> None:
            nonlocal closing
            closing = True
            task.cancel()
            await asyncio.wait({task})
            if early:
                raise UncleanStop(f"{name} had ended early")
            if not task.cancelled():
                task.result()

        task.add_done_callback(ended)
        self.add(name, close, within_s=within_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        failed: list[str] = []
        while self._groups:
            _, steps = self._groups.popitem()
            closed = await asyncio.gather(*(_closed(*step) for step in steps))
            failed += [step.name for step, well in zip(steps, closed, strict=True) if not well]
        if failed and error is None:
            raise UncleanStop(f"not closed cleanly: {', '.join(failed)}")


async def _closed(name: str, close: Callable[[], Awaitable[object]], within_s: float) -> bool:
    async def step() -> None:
        await close()

    task = asyncio.create_task(step(), name=f"closing {name}")
    await asyncio.wait({task}, timeout=within_s)
    if not task.done():
        task.cancel()  # and not waited for: a step may be deaf to it
        log.error("closing_step_overran", step=name, within_s=within_s)
        return False
    if task.cancelled() or task.exception() is not None:
        log.error("closing_step_failed", step=name, exc_info=None if task.cancelled() else task.exception())
        return False
    return True


async def run_until_signal(
    main: Callable[[Stop], Awaitable[None]],
    *,
    exit_with_parent: bool = False,
    reload: Callable[[], None] | None = None,
    notices: Notices | None = None,
) -> int:
    """Run `main` until it returns; it must return soon after `stop.wait()` does.

    With `exit_with_parent` the end of standard input asks for a stop too. `reload` may raise SollolError.

    Returns:
        The exit status: 0 after a clean end, that of the refusal's reason after a SollolError, 1 after anything else.
    """
    notices = notices or Notices()
    stop = Stop(notices, reload)
    loop = asyncio.get_running_loop()
    restore = _handle_signals(loop, stop, hangup_is_reload=not exit_with_parent and not _has_terminal())
    try:
        if exit_with_parent:
            _watch_stdin(loop, stop)
        async with Closing() as closing:
            closing.run("pulse", pulse(stop, notices), stop, within_s=_PULSE_END_S)
            await main(stop)
    except SollolError as error:
        log.error("ended_by_refusal", reason=error.refusal.reason, message=error.refusal.message)  # noqa: TRY400 - expected
        return SURFACES[error.refusal.reason].exit_code
    except UncleanStop as error:
        log.error("stopped_uncleanly", error=str(error))  # noqa: TRY400 - each step has logged its own trace
        return 1
    except Exception:
        log.exception("ended_by_bug")
        return 1
    finally:
        if exit_with_parent:
            loop.remove_reader(_STDIN)
        restore()
    log.info("stopped", cause=stop.cause)
    return 0


def run(
    main: Callable[[Stop], Coroutine[Any, Any, None]],
    *,
    exit_with_parent: bool = False,
    reload: Callable[[], None] | None = None,
    notices: Notices | None = None,
) -> int:
    """`run_until_signal` in a new event loop, for entry points: `sys.exit(run(main))`.

    Once `main` is over, the process ends within a bound even if a task or a thread of a library does not.
    """
    faulthandler.enable()  # what a watchdog's SIGABRT found us doing
    gc.freeze()  # what is imported by now stays: no collection looks at it again, the one at the end least of all

    async def bounded() -> int:
        status = await run_until_signal(main, exit_with_parent=exit_with_parent, reload=reload, notices=notices)
        timer = threading.Timer(_LEAVE_WITHIN_S, os._exit, args=[status or 1])
        timer.daemon = True
        timer.start()
        return status

    return asyncio.run(bounded())


def _has_terminal() -> bool:
    return any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _handle_signals(loop: asyncio.AbstractEventLoop, stop: Stop, *, hangup_is_reload: bool) -> Callable[[], None]:
    ends = [signal.SIGINT, signal.SIGTERM]
    reloads = []
    if hangup_is_reload:
        reloads.append(signal.SIGHUP)
    elif signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
        ends.append(signal.SIGHUP)
    former = {number: signal.getsignal(number) for number in (*ends, *reloads)}

    def first(number: signal.Signals) -> None:
        # A plain handler from now on: it works even when the event loop is stuck.
        for each in ends:
            loop.remove_signal_handler(each)
            signal.signal(each, _leave_at_once)
        stop.request(number.name)

    def restore() -> None:
        for number, handler in former.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    for number in ends:
        loop.add_signal_handler(number, first, number)
    for number in reloads:
        loop.add_signal_handler(number, stop.reload)
    return restore


def _leave_at_once(number: int, _frame: FrameType | None) -> None:
    os.write(2, f"second {signal.Signals(number).name}: leaving at once\n".encode())
    os._exit(128 + number)


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: Stop) -> None:
    def readable() -> None:
        try:
            ended = not os.read(_STDIN, 4096)
        except OSError:  # a terminal that is gone
            ended = True
        if ended:
            loop.remove_reader(_STDIN)
            stop.request("parent ended")

    try:
        loop.add_reader(_STDIN, readable)
    except (OSError, ValueError) as error:  # a file or /dev/null, which cannot be waited on, or closed
        raise refuse(
            Reason.INVALID_REQUEST,
            "exit_with_parent needs a pipe or a terminal as standard input; leave it off otherwise",
        ) from error
