"""One model over several processes: real backends behind real forwarders, and a real coordinator that uses them."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest
from sollol.errors import Reason, SollolError
from sollol.gguf_split import read_model
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare, Instance, InstanceKind, InstanceState
from sollol.shape import shape_of

from agent.supervisor.backend import Backend
from agent.supervisor.files import files_of
from agent.supervisor.lending import BackendSite, backend_id, forwarder_id
from agent.supervisor.owner import Limits
from agent.supervisor.records import ENGINE, FORWARDER
from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.many_architectures import ARCHITECTURES, write_model
from tests.supervised import (
    Promised,
    directories,
    plan_of,
    record_of,
    runs,
    settled,
    site_of,
    started,
    supervising,
    wish_of,
)
from tests.toxic_proxy import ToxicProxy
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
REAL = Limits(start_timeout_s=30, stop_grace_s=5, gone_after_s=0.5, freeze_poll_s=0.2, connect_timeout_s=5)


@pytest.fixture
def site(engine_binary: Path, ports: Callable[[], int]) -> BackendSite:
    first = ports()
    return site_of(engine_binary.parent / "ggml-rpc-server", ports=range(first, first + 40))


@pytest.fixture
def gone() -> list[str]:
    """Instances in the order in which their reservations were given back."""
    return []


@pytest.fixture
async def supervisor(
    tmp_path: Path, engine_binary: Path, reciting_model: Path, site: BackendSite, gone: list[str]
) -> AsyncIterator[Supervisor]:
    """One agent that plays three: pools b1 and b2 lend, pool p uses them."""
    async with supervising(
        tmp_path,
        (str(engine_binary),),
        resolve=lambda _: reciting_model,
        limits=REAL,
        site=site,
        promises=Promised(gone.append),
    ) as supervisor:
        yield supervisor


async def lend(supervisor: Supervisor, pool_id: str, **wish: object) -> BackendEndpoint:
    endpoint = await supervisor.start_backend(wish_of(pool_id, **wish))
    return msgspec.structs.replace(endpoint, node_id=pool_id)


def split(*backends: BackendEndpoint, layers: tuple[int, ...] = (5, 4)) -> CoordinatorPlan:
    shares = [DeviceShare(device_id="CPU", layers=0)]
    shares += [
        DeviceShare(device_id="CPU", layers=count, node_id=backend.node_id)
        for backend, count in zip(backends, layers, strict=True)
    ]
    return msgspec.structs.replace(plan_of("tiny"), shares=tuple(shares), backends=backends)


async def start_split(supervisor: Supervisor) -> Instance:
    plan = split(await lend(supervisor, "b1"), await lend(supervisor, "b2"))
    return await started(supervisor, "p", plan)


def view(supervisor: Supervisor, instance_id: str) -> Instance | None:
    return next((item for item in supervisor.instances() if item.instance_id == instance_id), None)


def forwarder_pid(tmp_path: Path, pool_id: str) -> int:
    return record_of(tmp_path, backend_id(pool_id)).processes[FORWARDER].pid


async def recite(supervisor: Supervisor, pool_id: str = "p", tokens: int = 100) -> str:
    body = {"prompt": "hello", "temperature": 0, "n_predict": tokens}
    connector = aiohttp.UnixConnector(path=str(supervisor.socket_of(pool_id)))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://engine/completion", json=body) as response,
    ):
        return str((await response.json())["content"])


async def stream(supervisor: Supervisor, seen: asyncio.Event) -> int:
    """Read a long answer to its end, or to where it breaks; the number of its frames."""
    body = {"prompt": "hello", "n_predict": 400, "stream": True, "ignore_eos": True}
    connector = aiohttp.UnixConnector(path=str(supervisor.socket_of("p")))
    frames = 0
    async with aiohttp.ClientSession(connector=connector) as session:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post("http://engine/completion", json=body) as response:
                async for _ in response.content:
                    frames += 1
                    seen.set()
    return frames


async def test_two_backends_and_a_coordinator_recite_exactly_what_one_engine_does(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    alone = await started(supervisor, "alone", plan_of("tiny"))
    expected = await recite(supervisor, "alone")
    await supervisor.stop(alone.instance_id)
    ready = await start_split(supervisor)
    assert await recite(supervisor) == expected
    assert (ready.kind, ready.pool_id) == (InstanceKind.COORDINATOR, "p")
    lent = view(supervisor, backend_id("b1"))
    assert lent is not None
    assert (lent.kind, lent.pool_id, lent.state) == (InstanceKind.BACKEND, "b1", InstanceState.READY)
    log = supervisor.log_path("p").read_text()
    assert "offloaded 9/9 layers" in log
    assert log.count("model buffer size") >= 2
    status = [owner.forwarder_status() for owner in supervisor._owners if isinstance(owner, Backend)]
    assert all(item is not None and item.attached and item.refused == 0 for item in status), status


async def test_a_killed_backend_ends_its_coordinator_and_leaves_nothing(
    supervisor: Supervisor, tmp_path: Path, gone: list[str]
) -> None:
    await start_split(supervisor)
    seen = asyncio.Event()
    answer = asyncio.create_task(stream(supervisor, seen))
    await asyncio.wait_for(seen.wait(), 5)
    lending = view(supervisor, backend_id("b1"))
    assert lending is not None
    forwarder = forwarder_pid(tmp_path, "b1")
    os.kill(lending.pid, signal.SIGKILL)
    refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=2, what="the coordinator has failed")
    assert refusal.reason is Reason.ENGINE_DIED
    assert "backend on b1 or b2 was lost" in refusal.message, refusal
    assert (await answer) > 0
    lost = await wait_until(lambda: supervisor.failure_of(backend_id("b1")), within_s=1, what="the backend has failed")
    assert lost.reason is Reason.ENGINE_DIED
    assert not runs(forwarder)
    assert {"p", backend_id("b1")} <= set(gone)
    await wait_until(lambda: backend_id("b2") in gone, what="the other backend has ended by itself")
    assert view(supervisor, backend_id("b2")) is None


async def test_a_backend_that_dies_while_nobody_asks_anything_ends_its_coordinator_too(supervisor: Supervisor) -> None:
    """The engine itself would notice at the next request, and its health would look fine until then."""
    await start_split(supervisor)
    lending = view(supervisor, backend_id("b2"))
    assert lending is not None
    os.kill(lending.pid, signal.SIGKILL)
    refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=2, what="the coordinator has failed")
    assert refusal.reason is Reason.ENGINE_DIED
    assert "lost its backend on b2" in refusal.message


async def test_backends_end_by_themselves_when_their_coordinator_is_killed(
    supervisor: Supervisor, gone: list[str]
) -> None:
    ready = await start_split(supervisor)
    os.kill(ready.pid, signal.SIGKILL)
    await wait_until(lambda: {backend_id("b1"), backend_id("b2")} <= set(gone), what="both backends have ended")
    stopped = supervisor.failure_of(backend_id("b1"))
    assert stopped is not None
    assert stopped.reason is Reason.STOPPED


async def test_a_backend_to_which_nobody_attaches_ends(supervisor: Supervisor, gone: list[str]) -> None:
    await lend(supervisor, "b1", attach_within_s=0.3)
    await wait_until(lambda: backend_id("b1") in gone, what="it has ended")


async def test_a_stopped_backend_is_given_up_and_its_coordinator_with_it(
    supervisor: Supervisor, gone: list[str]
) -> None:
    await start_split(supervisor)
    seen = asyncio.Event()
    answer = asyncio.create_task(stream(supervisor, seen))
    await asyncio.wait_for(seen.wait(), 5)
    lending = view(supervisor, backend_id("b2"))
    assert lending is not None
    os.kill(lending.pid, signal.SIGSTOP)
    refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=3, what="the coordinator has failed")
    assert refusal.reason is Reason.ENGINE_DIED
    await answer
    frozen = await wait_until(lambda: supervisor.failure_of(backend_id("b2")), what="the backend has failed")
    assert frozen.reason is Reason.ENGINE_STALLED


async def test_stopping_a_pool_stops_its_coordinator_and_its_backend(supervisor: Supervisor, gone: list[str]) -> None:
    own = msgspec.structs.replace(await lend(supervisor, "p"), node_id="n1")
    plan = msgspec.structs.replace(split(own, layers=(9,)))
    ready = await started(supervisor, "p", plan)
    lending = view(supervisor, backend_id("p"))
    assert lending is not None
    await supervisor.stop("p")
    assert gone == ["p", backend_id("p")]
    assert not runs(ready.pid)
    assert not runs(lending.pid)
    assert "cleaning up before exit" in supervisor.log_path("p").read_text()


async def test_asking_twice_gives_the_same_backend(supervisor: Supervisor) -> None:
    first, second = await asyncio.gather(lend(supervisor, "b1"), lend(supervisor, "b1"))
    assert first == second == await lend(supervisor, "b1")
    assert len(supervisor.instances()) == 1


async def test_a_second_coordinator_is_refused_at_once_and_the_first_goes_on(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    backends = await lend(supervisor, "b1"), await lend(supervisor, "b2")
    await started(supervisor, "p", split(*backends))
    seen = asyncio.Event()
    answer = asyncio.create_task(stream(supervisor, seen))
    await asyncio.wait_for(seen.wait(), 5)
    began_s = time.monotonic()
    await supervisor.start("q", split(*backends))
    refusal = (await settled(supervisor, "q")).refusal
    assert refusal is not None
    assert refusal.reason is Reason.ENGINE_DIED
    assert time.monotonic() - began_s < 5
    assert (await answer) > 400
    assert await recite(supervisor)


async def test_backends_and_coordinator_outlive_a_crashed_agent_and_are_taken_up_by_the_next(
    tmp_path: Path, site: BackendSite, engine_binary: Path, reciting_model: Path
) -> None:
    words = (str(tmp_path), str(engine_binary), str(reciting_model), str(site.ports.start))
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CRASHING_AGENT, *words, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    before = json.loads(await asyncio.wait_for(agent.stdout.readline(), 30))
    agent.kill()
    await agent.wait()
    promises = Promised()
    async with supervising(
        tmp_path, (str(engine_binary),), resolve=lambda _: reciting_model, limits=REAL, site=site, promises=promises
    ) as supervisor:
        assert supervisor.adopt() == 3
        assert {"p", "b1.backend", "b2.backend"} == {name for name, _ in promises.restored}
        await wait_until(
            lambda: all(item.state is InstanceState.READY for item in supervisor.instances()), what="all serve again"
        )
        assert {item.instance_id: item.pid for item in supervisor.instances()} == before
        assert await recite(supervisor)
        assert (await lend(supervisor, "b1")).port, "the same one, not another"
        assert {item.instance_id: item.pid for item in supervisor.instances()} == before

        forwarders = [forwarder_pid(tmp_path, name) for name in ("b1", "b2")]
        await supervisor.stop("p")
        await wait_until(lambda: not view(supervisor, "b1.backend"), within_s=10, what="b1 has nobody left to serve")
        await wait_until(lambda: not view(supervisor, "b2.backend"), within_s=10, what="b2 has nobody left to serve")
        assert not any(runs(pid) for pid in (*before.values(), *forwarders))
    assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "state" / "instances").iterdir())


CRASHING_AGENT = """
import asyncio, json, sys
from pathlib import Path
import structlog
from tests.agent.test_supervisor_split import REAL, site_of, start_split, supervising

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main():
    where, engine, model, port = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    site = site_of(engine.parent / "ggml-rpc-server", ports=range(port, port + 40))
    async with supervising(where, (str(engine),), resolve=lambda _: model, limits=REAL, site=site) as supervisor:
        await start_split(supervisor)
        print(json.dumps({item.instance_id: item.pid for item in supervisor.instances()}), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("role", [ENGINE, FORWARDER])
async def test_a_backend_of_which_half_is_gone_is_not_taken_up(tmp_path: Path, site: BackendSite, role: str) -> None:
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        await supervisor.start_backend(wish_of("b1"))
        await supervisor.close(leave=True)
    processes = record_of(tmp_path, "b1.backend").processes
    os.kill(processes[role].pid, signal.SIGKILL)
    await wait_until(lambda: not runs(processes[role].pid), what="half of it is gone")
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        assert supervisor.adopt() == 0
        await wait_until(lambda: not any(runs(each.pid) for each in processes.values()), what="its rest is ended")
        await wait_until(lambda: not list((tmp_path / "state" / "instances").iterdir()), what="it is forgotten")
        assert await supervisor.start_backend(wish_of("b1"))


async def test_a_backend_that_was_taken_up_says_why_it_ended(tmp_path: Path, site: BackendSite) -> None:
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        await supervisor.start_backend(wish_of("b1"))
        await supervisor.close(leave=True)
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        assert supervisor.adopt() == 1
        await wait_until(lambda: view(supervisor, "b1.backend").state is InstanceState.READY, what="it serves again")
        os.kill(view(supervisor, "b1.backend").pid, signal.SIGKILL)
        await wait_until(lambda: view(supervisor, "b1.backend").refusal, what="it is told")
        refusal = view(supervisor, "b1.backend").refusal
        assert refusal is not None
        assert refusal.reason is Reason.ENGINE_DIED
        assert "an earlier agent had started it" in refusal.message


async def test_a_taken_port_is_passed_over(supervisor: Supervisor, site: BackendSite) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.ports.start))
        taken.listen()
        assert (await lend(supervisor, "b1")).port > site.ports.start


async def test_a_port_that_is_taken_only_then_is_tried_no_more(
    supervisor: Supervisor, site: BackendSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another agent on this machine is faster: the check says free, the backend finds it taken."""
    monkeypatch.setattr("agent.supervisor.ports._is_free", lambda *_: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.ports.start))
        taken.listen()
        assert await lend(supervisor, "b1")
        taken.setblocking(False)
        with pytest.raises(BlockingIOError):
            taken.accept()  # nobody has said hello to a stranger


async def test_no_free_port_at_all_is_said(tmp_path: Path, engine_binary: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        site = site_of(engine_binary.parent / "ggml-rpc-server", ports=range(port, port + 1))
        async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
            with pytest.raises(SollolError) as refused:
                await lend(supervisor, "b1")
    assert refused.value.refusal.reason is Reason.PORT_TAKEN


async def test_a_backend_without_a_port_for_its_forwarder_says_so_and_ends(tmp_path: Path, site: BackendSite) -> None:
    site = msgspec.structs.replace(site, ports=site.ports[:1])
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        with pytest.raises(SollolError) as refused:
            await lend(supervisor, "b1")
        assert refused.value.refusal.reason is Reason.PORT_TAKEN
        assert [item.state for item in supervisor.instances()] == [InstanceState.FAILED]


async def test_a_device_that_is_not_there_fails_with_the_log(supervisor: Supervisor) -> None:
    with pytest.raises(SollolError) as refused:
        await lend(supervisor, "b1", bytes={"CUDA7": 1})
    refusal = refused.value.refusal
    assert refusal.reason is Reason.ENGINE_START_FAILED
    assert any("CUDA7" in line for line in refusal.log_lines), refusal


async def test_one_that_dies_when_it_is_greeted_is_said_to_have_ended_and_not_to_speak_otherwise(
    tmp_path: Path, ports: Callable[[], int]
) -> None:
    program = tmp_path / "ggml-rpc-server"
    program.write_text(
        f"#!{sys.executable}\nimport os, socket, sys\n"
        "with socket.create_server(('127.0.0.1', int(sys.argv[4]))) as server:\n"
        "    server.accept()[0].close()\n    os.kill(os.getpid(), 9)\n"
    )
    program.chmod(0o700)
    first = ports()
    site = site_of(program, ports=range(first, first + 4))
    async with supervising(tmp_path, fake_engine(), limits=REAL, site=site) as supervisor:
        with pytest.raises(SollolError) as refused:
            await lend(supervisor, "b1")
    refusal = refused.value.refusal
    assert refusal.reason is Reason.ENGINE_START_FAILED
    assert "ended before it answered (SIGKILL)" in refusal.message


async def test_without_the_program_it_is_missing(tmp_path: Path) -> None:
    for program in (None, tmp_path / "not-there"):
        async with supervising(tmp_path, fake_engine(), site=site_of(program)) as supervisor:
            with pytest.raises(SollolError) as refused:
                await lend(supervisor, "b1")
            assert refused.value.refusal.reason is Reason.ENGINE_MISSING


async def test_a_coordinator_whose_backend_is_not_there_names_its_node(supervisor: Supervisor) -> None:
    nowhere = BackendEndpoint(node_id="lost-node", host="127.0.0.1", port=17_799, device_ids=("CPU",))
    await supervisor.start("p", split(nowhere, layers=(9,)))
    refusal = (await settled(supervisor, "p")).refusal
    assert refusal is not None
    assert refusal.reason is Reason.ENGINE_DIED
    assert "backend on lost-node was lost" in refusal.message


async def test_a_coordinator_that_hangs_at_a_silent_backend_is_given_up_early(
    tmp_path: Path, engine_binary: Path, reciting_model: Path
) -> None:
    limits = msgspec.structs.replace(REAL, connect_timeout_s=0.5)
    engine = (str(engine_binary),)
    async with supervising(tmp_path, engine, resolve=lambda _: reciting_model, limits=limits) as supervisor:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            port = silent.getsockname()[1]
            endpoint = BackendEndpoint(node_id="mute", host="127.0.0.1", port=port, device_ids=("CPU",))
            await supervisor.start("p", split(endpoint, layers=(9,)))
            refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=10, what="it is given up")
    assert refusal.reason is Reason.ENGINE_STALLED
    assert "backend on mute" in refusal.message


async def test_a_backend_takes_no_requests(supervisor: Supervisor) -> None:
    await lend(supervisor, "b1")
    with pytest.raises(SollolError) as refused:
        supervisor.socket_of(backend_id("b1"))
    assert refused.value.refusal.reason is Reason.INVALID_REQUEST


async def test_the_forwarder_is_small_and_its_log_is_lines(supervisor: Supervisor, tmp_path: Path) -> None:
    await lend(supervisor, "b1", attach_within_s=0.3)
    pid = forwarder_pid(tmp_path, "b1")
    assert psutil.Process(pid).memory_info().rss < 20 << 20
    await wait_until(lambda: not runs(pid), what="it has ended")
    lines = files_of(forwarder_id("b1"), directories(tmp_path)).log.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["ended"]


async def test_the_upload_to_each_backend_is_counted_while_the_link_is_slow(
    tmp_path: Path, engine_binary: Path, site: BackendSite
) -> None:
    """Some 45 MB of weights over cables of 20 MB/s each."""
    model = tmp_path / "wide.gguf"
    write_model(model, ARCHITECTURES["llama"])
    shape = shape_of(read_model([model]))
    planned = [sum(shape.layer_bytes[:4]), sum(shape.layer_bytes[4:]) + shape.output_bytes]
    seen: dict[str, list[float]] = {"b1": [], "b2": []}
    async with (
        supervising(tmp_path, (str(engine_binary),), resolve=lambda _: model, limits=REAL, site=site) as supervisor,
        contextlib.AsyncExitStack() as stack,
    ):
        supervisor.subscribe(lambda each: seen.get(each.pool_id, []).append(each.percent))
        backends = []
        for pool_id, size in zip(seen, planned, strict=True):
            lent = await lend(supervisor, pool_id, upload_bytes=size)
            proxy = await stack.enter_async_context(ToxicProxy((lent.host, lent.port)).running())
            proxy.bytes_per_s = 20e6
            backends.append(msgspec.structs.replace(lent, port=proxy.address[1]))
        await started(supervisor, "p", split(*backends, layers=(4, shape.layers - 3)))
        for pool_id, percents in seen.items():
            await wait_until(lambda told=percents: told[-1] == 100, what=f"all has arrived at {pool_id}")
            assert percents == sorted(percents)
            assert percents[0] == 0
            assert any(0 < percent < 100 for percent in percents), seen
        await supervisor.stop("p")
