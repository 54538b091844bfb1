import asyncio
import os
import pty
import signal
import subprocess
import sys
import textwrap
from typing import Self

import pytest
from sollol.errors import Reason, refuse
from sollol.lifecycle import Closing, Stop, UncleanStop, run_until_signal

PREAMBLE = """
import asyncio, signal, sys, threading, time
from sollol import lifecycle, log
log.configure("info", "json")
def say(text): print(text, flush=True)
"""


class Daemon:
    """A real process, since signals and exit statuses are what is being tested."""

    def __init__(self, body: str, options: str = "", stdin=subprocess.DEVNULL) -> None:
        program = PREAMBLE + textwrap.dedent(body) + f"\nsys.exit(lifecycle.run(main{options}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, within_s: float = 10) -> tuple[int, str]:
        _out, err = self.process.communicate(timeout=within_s)
        return self.process.returncode, err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


GRACEFUL = """
async def main(stop):
    async with lifecycle.Closing() as closing:
        async def close(): say("closed")
        closing.add("thing", close, within_s=1)
        say("ready")
        await stop.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_gracefully_with_status_0(number):
    with Daemon(GRACEFUL) as daemon:
        assert daemon.hear() == "ready"
        daemon.send(number)
        assert daemon.hear() == "closed"
        status, log_text = daemon.end()
        assert status == 0
        assert f'"event":"stopped","cause":"{number.name}"' in log_text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_leaves_at_once_even_when_the_event_loop_is_stuck(number, status):
    body = """
    async def main(stop):
        say("ready")
        await stop.wait()
        say("stopping")
        while True:
            pass
    """
    with Daemon(body) as daemon:
        assert daemon.hear() == "ready"
        daemon.send(signal.SIGTERM)
        assert daemon.hear() == "stopping"
        daemon.send(number)
        assert daemon.end()[0] == status


def test_a_task_or_thread_that_never_ends_cannot_keep_the_process():
    body = """
    lifecycle._LEAVE_WITHIN_S = 0.3
    async def main(stop):
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        say("ready")
        await stop.wait()
    """
    with Daemon(body) as daemon:
        assert daemon.hear() == "ready"
        daemon.send(signal.SIGTERM)
        status, _ = daemon.end()
        assert status == 1, "not a clean end, and the status says so"


def test_the_status_is_1_when_a_closing_step_overran():
    body = """
    async def main(stop):
        async with lifecycle.Closing() as closing:
            closing.add("deaf", lambda: asyncio.sleep(60), within_s=0.1)
            stop.request("test")
    """
    with Daemon(body) as daemon:
        status, log_text = daemon.end()
        assert status == 1
        assert '"event":"closing_step_overran","step":"deaf"' in log_text


async def test_steps_of_one_group_close_together_where_the_newest_of_them_stands():
    said, both = [], asyncio.Barrier(2)

    def step(name, *, meets=False):
        async def close():
            if meets:
                await both.wait()
            said.append(name)

        return close

    async with Closing() as closing:
        closing.add("first", step("first"), within_s=5)
        closing.add("one", step("one", meets=True), within_s=5, group="pair")
        closing.add("between", step("between"), within_s=5)
        closing.add("other", step("other", meets=True), within_s=5, group="pair")
        closing.add("last", step("last"), within_s=5)

    assert (said[0], set(said[1:3]), said[3:]) == ("last", {"one", "other"}, ["between", "first"])


async def test_a_step_that_overruns_is_told_by_name_and_stops_none_of_its_group():
    said = []

    async def good():
        said.append("good")

    async def closed():
        async with Closing() as closing:
            closing.add("deaf", lambda: asyncio.sleep(60), within_s=0.1, group="pair")
            closing.add("good", good, within_s=5, group="pair")

    with pytest.raises(UncleanStop, match=r"^not closed cleanly: deaf$"):
        await closed()

    assert said == ["good"]


def test_the_end_of_standard_input_stops_a_child_that_shall_leave_with_its_parent():
    with Daemon(GRACEFUL, options=", exit_with_parent=True", stdin=subprocess.PIPE) as daemon:
        assert daemon.hear() == "ready"
        daemon.process.stdin.write("ignored\n")
        daemon.process.stdin.flush()
        assert daemon.process.poll() is None
        status, log_text = daemon.end()  # closes standard input
        assert status == 0
        assert '"cause":"parent ended"' in log_text


def test_leaving_with_the_parent_needs_a_standard_input_that_can_end():
    with Daemon(GRACEFUL, options=", exit_with_parent=True") as daemon:
        status, log_text = daemon.end()
        assert status == 2
        assert "exit_with_parent needs a pipe" in log_text


async def test_a_refusal_ends_with_its_own_exit_status():
    async def main(_stop: Stop) -> None:
        raise refuse(Reason.NO_FIT, "no node is big enough")

    assert await run_until_signal(main) == 5


async def test_a_bug_ends_with_status_1():
    async def main(_stop: Stop) -> None:
        raise ZeroDivisionError

    assert await run_until_signal(main) == 1


async def test_signal_handlers_are_put_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    async def main(stop: Stop) -> None:
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
        assert stop.cause == "SIGTERM"

    assert await run_until_signal(main) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


async def test_steps_close_in_reverse_order_and_a_failed_one_does_not_stop_the_others():
    closed = []

    async def fails() -> None:
        closed.append("second")
        raise OSError("cannot")

    async def note(name: str) -> None:
        closed.append(name)

    closing = Closing()
    closing.add("first", lambda: note("first"), within_s=1)
    closing.add("second", fails, within_s=1)
    closing.add("third", lambda: note("third"), within_s=1)
    with pytest.raises(UncleanStop, match="not closed cleanly: second"):
        await closing.__aexit__(None, None, None)
    assert closed == ["third", "second", "first"]


async def test_a_step_deaf_to_cancellation_is_left_after_its_bound():
    release = asyncio.Event()

    async def deaf() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(UncleanStop):
        async with asyncio.timeout(2), Closing() as closing:
            closing.add("deaf", deaf, within_s=0.05)
    release.set()


async def test_the_blocks_own_exception_is_kept_when_closing_fails_too():
    async def broken_block() -> None:
        async with Closing() as closing:
            closing.add("overruns", lambda: asyncio.sleep(5), within_s=0.01)
            raise KeyError

    with pytest.raises(KeyError):
        await broken_block()


async def test_background_work_is_cancelled_when_its_turn_to_close_comes():
    order = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            order.append("work")

    async def note() -> None:
        order.append("later step")

    stop = Stop()
    async with Closing() as closing:
        closing.run("work", work(), stop, within_s=1)
        closing.add("later step", note, within_s=1)
        await asyncio.sleep(0)
    assert order == ["later step", "work"]
    assert not stop.requested, "cancelling it is not an early end"


async def test_background_work_that_breaks_stops_the_daemon_uncleanly():
    async def breaks() -> None:
        raise ZeroDivisionError

    async def main(stop: Stop) -> None:
        async with Closing() as closing:
            closing.run("work", breaks(), stop, within_s=1)
            await stop.wait()
            assert stop.cause == "work ended"

    assert await run_until_signal(main) == 1


async def test_the_first_cause_of_a_stop_stays():
    stop = Stop()
    stop.request("first")
    stop.request("second")
    await stop.wait()
    assert (stop.cause, stop.requested) == ("first", True)


RELOADING = """
def reload():
    say("reloaded")
async def main(stop):
    stop.announce_ready()
    say("ready")
    await stop.wait()
"""


def test_a_hangup_reloads_a_service_and_it_goes_on():
    with Daemon(RELOADING, options=", reload=reload") as daemon:
        assert daemon.hear() == "ready"
        for _ in range(2):
            daemon.send(signal.SIGHUP)
            assert daemon.hear() == "reloaded"
        daemon.send(signal.SIGTERM)
        assert daemon.end()[0] == 0


def test_a_hangup_of_a_service_that_does_not_serve_yet_changes_nothing():
    body = """
    def reload():
        say("reloaded")
    async def main(stop):
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0)
        say("ready")
        await stop.wait()
    """
    with Daemon(body, options=", reload=reload") as daemon:
        assert daemon.hear() == "ready"
        daemon.send(signal.SIGTERM)
        status, log_text = daemon.end()
        assert status == 0
        assert "reload_ignored" in log_text


def test_a_hangup_of_the_terminal_stops_a_daemon_that_has_one():
    ours, theirs = pty.openpty()
    try:
        with Daemon(RELOADING, options=", reload=reload", stdin=theirs) as daemon:
            assert daemon.hear() == "ready"
            daemon.send(signal.SIGHUP)
            assert daemon.end()[0] == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_hangup_stops_a_child_that_shall_leave_with_its_parent():
    with Daemon(RELOADING, options=", reload=reload, exit_with_parent=True", stdin=subprocess.PIPE) as daemon:
        assert daemon.hear() == "ready"
        daemon.send(signal.SIGHUP)
        daemon.process.wait(10)
        assert daemon.end()[0] == 0


async def test_systemd_hears_of_a_reload_even_when_it_is_refused(systemd):
    def refused() -> None:
        raise refuse(Reason.INVALID_REQUEST, "no such setting")

    stop = Stop(systemd.notices, refused)
    stop.announce_ready()
    stop.reload()

    ready, reloading, ready_again = systemd.heard()
    assert (ready, ready_again) == ("READY=1", "READY=1")
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")


async def test_systemd_hears_what_the_daemon_does_that_it_is_ready_and_that_it_stops(systemd):
    async def main(stop: Stop) -> None:
        stop.announce_ready(lambda: "2 nodes")
        stop.request("test")

    assert await run_until_signal(main, notices=systemd.notices) == 0
    assert systemd.heard() == ["STATUS=2 nodes", "READY=1", "STOPPING=1"]


async def test_a_status_that_cannot_be_told_ends_the_daemon_and_is_no_silence(systemd, monkeypatch):
    monkeypatch.setattr("sollol.pulse.BEAT_S", 0.01)

    async def main(stop: Stop) -> None:
        told = iter(["2 nodes"])
        stop.announce_ready(lambda: next(told))
        await stop.wait()
        assert stop.cause == "pulse ended"

    assert await run_until_signal(main, notices=systemd.notices) == 1
