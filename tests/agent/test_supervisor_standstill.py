"""A coordinator that lives and does nothing is ended, and one that only has slow readers is not."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import msgspec
import pytest
from sollol.errors import Reason, Refusal
from sollol.report import BackendEndpoint, DeviceShare, InstanceState

from agent.supervisor.freeze import FreezeWatch, Look
from agent.supervisor.standstill import Standstill
from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.supervised import QUICK, plan_of, runs, started, supervising
from tests.waiting import wait_until

LIMITS = msgspec.structs.replace(QUICK, freeze_poll_s=0.2, stop_grace_s=30)


@asynccontextmanager
async def reading(supervisor: Supervisor, lines: int, of: str = "p") -> AsyncIterator[None]:
    """A stream of which so many lines are read, and then none."""
    body = {"prompt": "?", "stream": True, "max_tokens": 400}
    connector = aiohttp.UnixConnector(path=str(supervisor.socket_of(of)))
    async with (
        aiohttp.ClientSession(connector=connector, read_bufsize=1024) as session,
        session.post("http://engine/v1/completions", json=body) as response,
    ):
        for _ in range(lines):
            await response.content.readline()
        yield


async def failed(supervisor: Supervisor, within_s: float) -> Refusal:
    refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=within_s, what="it is given up")
    assert refusal.reason is Reason.ENGINE_STALLED, refusal
    return refusal


async def test_one_that_is_stopped_by_a_signal_is_ended_at_once_however_long_its_grace(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine(), limits=LIMITS) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        os.kill(pid, signal.SIGSTOP)
        refusal = await failed(supervisor, within_s=2)
        assert "stopped by a signal" in refusal.message
        assert not runs(pid)


async def test_one_that_is_stopped_while_it_loads_is_ended_too(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("stall_at=0.5"), limits=LIMITS) as supervisor:
        await supervisor.start("p", plan_of("m"))
        await wait_until(lambda: supervisor.instances()[0].percent >= 50, what="half is loaded")
        os.kill(supervisor.instances()[0].pid, signal.SIGSTOP)
        await failed(supervisor, within_s=2)


async def test_one_that_goes_on_in_time_serves_on(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, freeze_poll_s=1.0)
    async with supervising(tmp_path, fake_engine(), limits=limits) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
        async with reading(supervisor, 5):
            assert supervisor.instances()[0].state is InstanceState.READY


async def test_one_that_generates_and_computes_nothing_is_ended_within_five_seconds_and_one_with_a_slow_reader_is_not(
    tmp_path: Path,
) -> None:
    limits = msgspec.structs.replace(LIMITS, freeze_poll_s=0.5)
    async with supervising(tmp_path, fake_engine("tokens=9"), limits=limits, streams=lambda _: 1) as supervisor:
        await started(supervisor, "p", plan_of("hangs@hang_after=3"))
        await started(supervisor, "slow", plan_of("m"))
        async with reading(supervisor, 1, of="slow"):
            with suppress(aiohttp.ClientError):
                async with reading(supervisor, 3):
                    refusal = await failed(supervisor, within_s=5)
            assert supervisor.instances()[-1].state is InstanceState.READY
        assert "computed nothing" in refusal.message


def said(*seen: Look, slack_ticks: int = 0) -> list[str]:
    watch = FreezeWatch(computes_here=True, slack_ticks=slack_ticks)
    return [watch.sees(look, float(at)) for at, look in enumerate(seen)]


def test_answering_us_is_not_getting_on_with_the_work() -> None:
    creeping = [Look(state="S", cpu_ticks=at, has_work=True) for at in range(6)]
    assert any(said(*creeping, slack_ticks=5))
    assert not any(said(*creeping, slack_ticks=0))


def test_a_little_work_at_first_hides_no_hang_behind_it() -> None:
    ticks = (0, 5, 5, 6, 6, 6)
    looks = [Look(state="S", cpu_ticks=each, has_work=True) for each in ticks]
    assert said(*looks, slack_ticks=5)[4].endswith("for 3 s")


def test_two_looks_far_apart_prove_nothing() -> None:
    """We, or the whole machine, may have been the ones that slept."""
    watch = FreezeWatch(computes_here=True)
    idle = Look(state="S", cpu_ticks=1, has_work=True)
    assert [watch.sees(idle, at) for at in (0.0, 1.0, 60.0)] == ["", "", ""]
    assert watch.sees(idle, 61.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"backends": (BackendEndpoint(node_id="n", host="127.0.0.1", port=7500, device_ids=("CPU",)),)},
        {"shares": (DeviceShare(device_id="CPU", layers=4), DeviceShare(device_id="CUDA0", layers=5))},
    ],
)
async def test_one_that_waits_for_others_to_compute_is_asked_nothing(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    plan = msgspec.structs.replace(plan_of("m"), **changes)
    asked = []
    standstill = Standstill(os.getpid(), plan, tmp_path / "none", streams=lambda: asked.append(1) or 1, every_s=0.0)
    for _ in range(3):
        assert await standstill.seen() == ""
    assert not asked
