"""The supervisor against an engine that does what engines do at their worst."""

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, SollolError
from sollol.report import Instance, InstanceState

from agent.supervisor.endpoints import TcpSite
from agent.supervisor.files import KEPT_LOGS
from agent.supervisor.owner import Limits
from agent.supervisor.restarts import RestartPolicy
from agent.supervisor.state import LIVE
from tests.fakes.fake_engine import fake_engine
from tests.supervised import QUICK, Promised, changes_of, plan_of, runs, settled, started, supervising
from tests.waiting import wait_until


async def test_a_start_returns_at_once_and_its_watch_ends_when_it_serves(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=0.3")) as supervisor:
        instance = await supervisor.start("p", plan_of("m"))
        assert instance.state is InstanceState.STARTING
        changes = await changes_of(supervisor, "p")
    assert [change.state for change in changes[:-1]] == [InstanceState.STARTING] * (len(changes) - 1)
    assert changes[-1].state is InstanceState.READY
    assert changes[-1].pid > 0
    assert changes[-1].percent == 100


async def test_a_pool_says_which_of_its_models_pools_it_is(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        ready = await started(supervisor, "p", replace(plan_of("m"), pool_number=3))
    assert ready.pool_number == 3


async def test_watchers_see_the_percent_rise(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=2")) as supervisor:
        await supervisor.start("p", plan_of("m"))
        percents = [change.percent for change in await changes_of(supervisor, "p")]
    assert percents == sorted(percents)
    assert len(set(percents)) > 4, percents


async def test_an_engine_without_progress_lines_becomes_ready_all_the_same(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=0.2", "progress=0")) as supervisor:
        await started(supervisor, "p", plan_of("m"))


async def test_two_starts_of_one_pool_share_one_process(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=0.2")) as supervisor:
        await asyncio.gather(*(supervisor.start("p", plan_of("m")) for _ in range(20)))
        ready = await settled(supervisor, "p")
        again = await supervisor.start("p", plan_of("m"))
        assert again == ready
        assert len(supervisor.instances()) == 1


async def test_the_socket_is_told_only_while_it_serves(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=0.2")) as supervisor:
        with pytest.raises(SollolError) as unknown:
            supervisor.socket_of("p")
        assert unknown.value.refusal.reason is Reason.INSTANCE_NOT_FOUND
        await supervisor.start("p", plan_of("m"))
        with pytest.raises(SollolError) as early:
            supervisor.socket_of("p")
        assert early.value.refusal.reason is Reason.INSTANCE_NOT_READY
        await settled(supervisor, "p")
        assert supervisor.socket_of("p").is_socket()


async def test_only_we_can_reach_the_socket(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        socket = supervisor.socket_of("p")
        assert socket.stat().st_mode & 0o077 == 0
        assert socket.parent.stat().st_mode & 0o777 == 0o700


async def test_a_stop_leaves_no_process_and_no_file_but_the_log(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        await supervisor.stop("p")
        assert not runs(pid)
        assert supervisor.instances() == ()
        assert supervisor.log_path("p").read_text().count("listening") == 1
    assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "state" / "instances").iterdir())


async def test_a_stop_of_a_served_engine_is_gentle_and_quick(tmp_path: Path) -> None:
    """In child mode SIGTERM alone does not end it: this would take the whole grace and a KILL."""
    async with supervising(tmp_path, fake_engine(), limits=Limits(stop_grace_s=30)) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        await asyncio.wait_for(supervisor.stop("p"), 5)
        assert "cleaning up before exit" in supervisor.log_path("p").read_text()


async def test_a_stop_while_loading_ends_in_stopped(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("stall_at=0.5")) as supervisor:
        await supervisor.start("p", plan_of("m"))
        watch = asyncio.create_task(changes_of(supervisor, "p"))
        await wait_until(lambda: supervisor.instances()[0].percent >= 50, what="half is loaded")
        await supervisor.stop("p")
        states = [change.state for change in await watch]
    assert states[-2:] == [InstanceState.STOPPING, InstanceState.STOPPED]


async def test_a_stop_before_the_process_is_there_ends_it_too(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        await supervisor.start("p", plan_of("m"))
        await supervisor.stop("p")
        assert supervisor.instances() == ()


async def test_a_stop_of_an_unknown_instance_succeeds(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        await supervisor.stop("never heard of")


async def test_an_engine_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("ignore_term=1")) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        await asyncio.wait_for(supervisor.stop("p"), 3 * QUICK.stop_grace_s + 2)
        assert not runs(pid)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_grandchildren_end_with_the_engine(tmp_path: Path, end: str) -> None:
    async with supervising(tmp_path, fake_engine("grandchild=1")) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        found = re.search(r"grandchild pid=(\d+)", supervisor.log_path("p").read_text())
        assert found is not None
        assert runs(int(found[1]))
        if end == "stop":
            await supervisor.stop("p")
        else:
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: supervisor.failure_of("p"), what="the death is seen")
        assert not runs(int(found[1]))


async def test_an_engine_killed_while_serving_has_died_within_a_second(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        os.kill(pid, signal.SIGKILL)
        refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=1, what="the death is seen")
        assert refusal.reason is Reason.ENGINE_DIED
        assert refusal.numbers == {"exit_code": -9}
        assert "SIGKILL" in refusal.message
        assert any("listening" in line for line in refusal.log_lines)
        failed = supervisor.instances()[0]
        assert (failed.state, failed.pid, failed.refusal) == (InstanceState.FAILED, 0, refusal)


async def test_the_reservation_is_given_back_after_the_process_and_before_the_news(tmp_path: Path) -> None:
    seen: list[tuple[str, InstanceState, bool]] = []

    def note(what: str, instance: Instance) -> None:
        seen.append((what, instance.state, runs(pid)))

    promises = Promised(on_gone=lambda _: note("gone", supervisor.instances()[0]))
    async with supervising(tmp_path, fake_engine(), promises=promises) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        supervisor.subscribe(lambda instance: note("news", instance))
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: len(seen) == 2, what="it is gone and told")
    assert seen == [("gone", InstanceState.FAILED, False), ("news", InstanceState.FAILED, False)]


async def test_a_death_at_start_fails_with_the_last_log_lines(tmp_path: Path) -> None:
    engine = fake_engine("die_at=0.5", "die=E_ggml_aligned_malloc:_insufficient_memory", "load_s=0.1")
    async with supervising(tmp_path, engine) as supervisor:
        await supervisor.start("p", plan_of("m"))
        refusal = (await settled(supervisor, "p")).refusal
    assert refusal is not None
    assert refusal.reason is Reason.OUT_OF_MEMORY
    assert refusal.log_lines[-1] == "E ggml aligned malloc: insufficient memory"


async def test_a_load_that_stands_still_is_given_up(tmp_path: Path) -> None:
    limits = Limits(start_timeout_s=0.4, stop_grace_s=0.5, poll_s=0.02)
    async with supervising(tmp_path, fake_engine("stall_at=0.3"), limits=limits) as supervisor:
        await supervisor.start("p", plan_of("m"))
        changes = await changes_of(supervisor, "p")
    assert [change.state for change in changes[-2:]] == [InstanceState.LOST, InstanceState.FAILED]
    assert changes[-1].refusal is not None
    assert changes[-1].refusal.reason is Reason.ENGINE_STALLED


async def test_a_slow_load_that_moves_is_not_given_up(tmp_path: Path) -> None:
    limits = Limits(start_timeout_s=2, stop_grace_s=0.5, poll_s=0.02)
    async with supervising(tmp_path, fake_engine("load_s=5"), limits=limits) as supervisor:
        await started(supervisor, "p", plan_of("m"))


async def test_a_flood_of_log_lines_blocks_nobody(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("flood=20000000")) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        assert supervisor.log_path("p").stat().st_size > 19_000_000


async def test_an_engine_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    async with supervising(tmp_path, ("/nowhere/llama-server",)) as supervisor:
        await supervisor.start("p", plan_of("m"))
        refusal = (await settled(supervisor, "p")).refusal
    assert refusal is not None
    assert refusal.reason is Reason.ENGINE_MISSING


async def test_a_crash_loop_backs_off_and_says_for_how_long(tmp_path: Path) -> None:
    policy = RestartPolicy(deaths=3, first_wait_s=3)
    async with supervising(tmp_path, fake_engine("die=broken"), restarts=policy) as supervisor:
        for number in range(3):
            await supervisor.start(f"p{number}", plan_of("m"))
            assert (await settled(supervisor, f"p{number}")).state is InstanceState.FAILED
        await wait_until(lambda: supervisor.instances()[-1].state is InstanceState.BACKOFF, what="it backs off")
        with pytest.raises(SollolError) as refused:
            await supervisor.start("p3", plan_of("m"))
        assert refused.value.refusal.reason is Reason.BACKING_OFF
        assert 0 < (refused.value.refusal.retry_after_s or 0) <= 3
        await supervisor.start("other", plan_of("another-model"))
        await wait_until(
            lambda: all(item.state is not InstanceState.BACKOFF for item in supervisor.instances()),
            within_s=20,
            what="the wait is over",
        )
        assert (await supervisor.start("p4", plan_of("m"))).state is InstanceState.STARTING


async def test_a_failed_pool_can_be_started_again_under_its_id(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: supervisor.failure_of("p"), what="the death is seen")
        assert (await started(supervisor, "p", plan_of("m"))).pid != pid
        assert len(supervisor.instances()) == 1


async def test_a_start_during_the_stop_of_the_same_pool_is_refused(tmp_path: Path) -> None:
    """Its reservation is about to be given back: a new process must not run on it."""
    async with supervising(tmp_path, fake_engine("ignore_term=1")) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        stop = asyncio.create_task(supervisor.stop("p"))
        await wait_until(lambda: supervisor.instances()[0].state is InstanceState.STOPPING, what="it is stopping")
        with pytest.raises(SollolError) as refused:
            await supervisor.start("p", plan_of("m"))
        assert refused.value.refusal.reason is Reason.INSTANCE_NOT_READY
        await stop


async def test_close_stops_all_at_once_and_refuses_new_starts(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("ignore_term=1")) as supervisor:
        for number in range(4):
            await started(supervisor, f"p{number}", plan_of("m"))
        pids = [item.pid for item in supervisor.instances()]
        await asyncio.wait_for(supervisor.close(), 3 * QUICK.stop_grace_s + 2)
        assert not any(runs(pid) for pid in pids)
        with pytest.raises(SollolError) as refused:
            await supervisor.start("p9", plan_of("m"))
        assert refused.value.refusal.reason is Reason.SHUTTING_DOWN


async def test_only_the_newest_failures_are_kept(tmp_path: Path) -> None:
    async with supervising(tmp_path, ("/nowhere/llama-server",), restarts=RestartPolicy(deaths=1000)) as supervisor:
        for number in range(25):
            await supervisor.start(f"p{number}", plan_of("m"))
            await settled(supervisor, f"p{number}")
        assert [item.instance_id for item in supervisor.instances()] == [f"p{number}" for number in range(5, 25)]


async def test_a_pool_id_never_becomes_a_path(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        await started(supervisor, "../../escape", plan_of("m"))
        assert supervisor.log_path("../../escape").parent == tmp_path / "log"


async def test_a_pid_is_known_exactly_while_there_is_a_process(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine("load_s=0.1")) as supervisor:
        seen: list[Instance] = []
        supervisor.subscribe(seen.append)
        await started(supervisor, "p", plan_of("m"))
        await supervisor.stop("p")
    assert all(item.state in LIVE for item in seen if item.pid)
    assert not seen[-1].pid


async def test_many_lives_leave_nothing_open(tmp_path: Path) -> None:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        await started(supervisor, "warm up", plan_of("m"))
        await supervisor.stop("warm up")
        before = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(5):
            await started(supervisor, f"p{number}", plan_of("m"))
            await supervisor.stop(f"p{number}")
        assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_the_log_of_one_that_serves_stays_short_and_goes_on(tmp_path: Path) -> None:
    limits = replace(QUICK, most_log_bytes=200_000, freeze_poll_s=0.05)
    async with supervising(tmp_path, fake_engine("flood=300000"), limits=limits) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        log = supervisor.log_path("p")
        await wait_until(lambda: log.stat().st_size < 100_000, what="it has been started anew")
        await supervisor.stop("p")
        text = log.read_text()
        assert "listening" in text, "its last lines are still there"
        assert text.splitlines()[-1].endswith("cleaning up before exit...")
        assert "\0" not in text


async def test_a_start_for_which_no_room_can_be_made_keeps_no_port(tmp_path: Path, ports: Callable[[], int]) -> None:
    first = ports()
    tcp = TcpSite(listen="127.0.0.1", host="127.0.0.1", ports=range(first, first + 1))
    async with supervising(tmp_path, fake_engine(), tcp=tcp) as supervisor:
        odd = [tmp_path / "log" / f"{number}.log" for number in range(KEPT_LOGS + 1)]
        for path in odd:
            path.mkdir()
        with pytest.raises(OSError, match="directory"):
            await supervisor.start("p", plan_of("m"))
        for path in odd:
            path.rmdir()
        assert (await supervisor.start("q", plan_of("m"))).endpoint.endswith(f":{first}")
