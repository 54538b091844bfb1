"""The pulse shows that the event loop turns: it stops when the loop does."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
from sollol import pulse as module
from sollol.lifecycle import Stop
from sollol.pulse import pulse

from tests.fakes.systemd import listening_systemd
from tests.waiting import wait_until


@pytest.fixture
def watched(tmp_path):
    with listening_systemd(str(tmp_path / "watched"), watchdog_s=60.0) as systemd:
        yield systemd


@asynccontextmanager
async def beating(systemd, stop):
    task = asyncio.create_task(pulse(stop, systemd.notices, beat_s=0.01))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_loop_that_turns_feeds_the_watchdog_and_tells_its_status(watched):
    stop = Stop(watched.notices)
    stop.announce_ready(lambda: "1 node")
    heard = watched.heard()

    async with beating(watched, stop):
        await wait_until(lambda: heard.extend(watched.heard()) or heard.count("WATCHDOG=1") > 2, what="fed")

    assert heard.count("STATUS=1 node") == 1
    assert not any(notice.startswith("EXTEND") for notice in heard)


async def test_a_stuck_loop_feeds_nothing_and_its_lateness_is_logged(watched, monkeypatch, capfd):
    monkeypatch.setattr(module, "LATE_S", 0.1)
    monkeypatch.setattr(module, "SICK_S", 0.2)

    async with beating(watched, Stop(watched.notices)):
        await wait_until(lambda: "WATCHDOG=1" in watched.heard(), what="fed")
        watched.heard()
        time.sleep(0.4)  # what a stuck loop is
        await asyncio.sleep(0)
        assert "WATCHDOG=1" not in watched.heard(), "neither while it was stuck nor for the turn that took so long"
        await wait_until(lambda: "WATCHDOG=1" in watched.heard(), what="fed again once it turns")

    assert "event_loop_late" in capfd.readouterr().out


async def test_more_time_is_asked_for_only_while_it_stops(watched):
    stop = Stop(watched.notices)
    async with beating(watched, stop):
        stop.request("test")
        heard = []
        await wait_until(lambda: heard.extend(watched.heard()) or "EXTEND_TIMEOUT_USEC=10000000" in heard, what="asked")

    assert any(notice.startswith("STATUS=stopping (test)") for notice in heard)


async def test_it_beats_often_enough_for_the_watchdog_that_is_set(tmp_path):
    with listening_systemd(str(tmp_path / "short"), watchdog_s=0.04) as systemd:
        task = asyncio.create_task(pulse(Stop(), systemd.notices))
        await wait_until(lambda: "WATCHDOG=1" in systemd.heard(), within_s=1, what="fed long before a usual beat")
        task.cancel()
        await asyncio.wait({task})


async def test_without_a_watchdog_nothing_is_fed(systemd):
    async with beating(systemd, Stop()):
        heard = []
        await wait_until(lambda: heard.extend(systemd.heard()) or heard, what="a beat")

    assert "WATCHDOG=1" not in heard
