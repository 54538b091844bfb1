"""How fast coordinators really are, from their own counters, while streams come and go."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, refuse
from sollol.report import BackendEndpoint, DeviceShare, Instance, InstanceKind, InstanceState
from structlog.testing import capture_logs

from agent import speed_meter, speeds
from agent.engine_client import Exchange, connect, request_bytes
from agent.speeds import FILE_NAME, Speeds
from agent.streams import Streams
from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, started, supervising
from tests.waiting import wait_until

TOKENS, RATE = 40, 400  # a tenth of a second
MS = 1000 / RATE


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed_meter, "SETTLE_S", 0.0)
    monkeypatch.setattr(speeds, "GAP_S", 0.01)


class Node:
    """A supervisor of fake engines, and what is observed of them."""

    def __init__(self, supervisor: Supervisor, path: Path, engine: str = "b1") -> None:
        self.supervisor, self.streams, self.changes = supervisor, Streams(), 0
        self.gone: set[str] = set()
        self.speeds = Speeds(
            path,
            engine=engine,
            threads=3,
            plan_of=supervisor.plan_of,
            socket_of=supervisor.socket_of,
            identity_of=self._identity,
            on_change=self._changed,
        )
        supervisor.subscribe(self.speeds.instance_changed)
        self.streams.subscribe(self.speeds.streams_changed)

    def _identity(self, model: str) -> str:
        if model in self.gone:
            raise refuse(Reason.MODEL_NOT_FOUND, f"no {model}")
        return f"identity of {model}"

    def _changed(self) -> None:
        self.changes += 1

    async def start(self, pool_id: str = "p", model: str = "llama", **plan: object) -> None:
        await started(self.supervisor, pool_id, replace(plan_of(model), **{"predicted_ms_per_token": 2.0, **plan}))

    async def generate(self, pool_id: str = "p", tokens: int = TOKENS) -> None:
        """One stream, as the relay carries it."""
        body = json.dumps({"prompt": "go", "n_predict": tokens, "stream": True}).encode()
        request = request_bytes("POST", "/completion", {"content-type": "application/json"}, body)
        exchange = Exchange(request, lambda _status, _headers: None, lambda _body: None)
        with self.streams.counted(pool_id):
            await connect(self.supervisor.socket_of(pool_id), exchange)
            await exchange.done

    async def observed(self, count: int = 1) -> None:
        await wait_until(lambda: self.changes >= count, within_s=5, what=f"{count} observations")


@contextlib.asynccontextmanager
async def running(tmp_path: Path, *knobs: str, engine: str = "b1") -> AsyncIterator[Node]:
    command = fake_engine(f"rate={RATE}", "tokens=1000", *knobs)
    async with supervising(tmp_path, command) as supervisor:
        node = Node(supervisor, tmp_path / FILE_NAME, engine)
        task = asyncio.create_task(node.speeds.run())
        try:
            yield node
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def nothing_comes_of(node: Node, streams: Awaitable[object], *, settled_s: float = 0.0) -> None:
    """Let them come to an end, and then a good stream: what was observed is that one's alone."""
    await streams
    meter = node.speeds._watched["p"].meter
    await wait_until(lambda: meter._clean, what="it is looked at")
    assert node.changes == 0
    await wait_until(lambda: asyncio.get_running_loop().time() >= settled_s, what="the pool has settled")
    await node.generate()
    await node.observed()
    (observation,) = node.speeds.observations()
    assert (observation.identity, observation.tokens) == ("identity of llama", TOKENS)


async def test_a_stream_tells_how_fast_its_model_runs_on_its_plan(tmp_path: Path):
    async with running(tmp_path) as node:
        await node.start(threads=0)
        assert node.speeds.observed_ms("p") == 0.0
        await node.generate()
        await node.observed()
        (found,) = node.speeds.observations()
        assert (found.identity, found.devices, found.layers) == ("identity of llama", ("CPU x3",), (9,))
        assert (found.tokens, found.predicted_ms_per_token) == (TOKENS, 2.0)
        assert MS * 0.5 < found.ms_per_token < MS * 10  # a busy machine is slower than the engine means to be
        assert node.speeds.observed_ms("p") == found.ms_per_token
        await node.supervisor.stop("p")
        assert node.speeds.observations() == (found,)
        assert node.speeds.observed_ms("p") == 0.0


async def test_the_key_has_the_threads_of_the_plan_and_of_those_that_lend(tmp_path: Path):
    lender = BackendEndpoint(node_id="b", host="127.0.0.1", port=7500, device_ids=("CPU",), threads=7)
    shares = (DeviceShare(device_id="CPU", layers=0), DeviceShare(device_id="CPU", layers=9, node_id="b"))
    split = replace(plan_of("llama"), shares=shares, backends=(lender,))
    async with running(tmp_path) as node:
        node.speeds._plan_of = {"split": split, "alone": plan_of("llama")}.get
        for name in ("split", "alone"):
            node.speeds.instance_changed(Instance(instance_id=name, model="llama", state=InstanceState.READY))
        keys = {name: watched.key.devices for name, watched in node.speeds._watched.items()}
    assert keys == {"split": ("b/CPU x7",), "alone": ("CPU x1",)}


async def test_short_answers_add_up(tmp_path: Path):
    async with running(tmp_path) as node:
        await node.start()
        for _ in range(5):
            await node.generate(tokens=10)
        await node.observed()
        assert node.speeds.observations()[0].tokens >= speed_meter.MIN_TOKENS


async def test_streams_side_by_side_do_not_count(tmp_path: Path):
    async with running(tmp_path) as node:
        await node.start()
        await nothing_comes_of(node, asyncio.gather(node.generate(), node.generate()))


async def test_streams_of_two_coordinators_at_once_do_not_count(tmp_path: Path):
    async with running(tmp_path) as node:
        await node.start()
        await node.start("q", "qwen")
        await nothing_comes_of(node, asyncio.gather(node.generate("p"), node.generate("q")))


async def test_the_first_seconds_of_a_pool_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed_meter, "SETTLE_S", 2.0)
    async with running(tmp_path) as node:
        await node.start()
        await nothing_comes_of(node, node.generate(), settled_s=asyncio.get_running_loop().time() + 2.0)


async def test_what_was_observed_outlives_the_agent_but_not_its_engine(tmp_path: Path):
    async with running(tmp_path) as node:
        await node.start()
        await node.generate()
        await node.observed()
        before = node.speeds.observations()
        await wait_until((tmp_path / FILE_NAME).exists, what="kept")
    async with running(tmp_path) as node:
        assert node.speeds.observations() == before
    async with running(tmp_path, engine="b2") as node:
        assert node.speeds.observations() == ()


async def test_a_damaged_file_costs_what_was_in_it_only(tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(b'{"version": 1, "content": {"engine"')
    async with running(tmp_path) as node:
        assert node.speeds.observations() == ()
        await node.start()
        await node.generate()
        await node.observed()
        await wait_until((tmp_path / FILE_NAME).exists, what="kept")
    assert list(tmp_path.glob(f"{FILE_NAME}.bad-*"))


async def test_a_full_disk_is_told_of_and_the_report_has_the_observation(tmp_path: Path):
    (tmp_path / f"{FILE_NAME}.new").mkdir()
    with capture_logs() as told:
        async with running(tmp_path) as node:
            await node.start()
            await node.generate()
            await node.observed()
            await wait_until(lambda: any(line["event"] == "speeds_not_kept" for line in told), what="told")
            assert len(node.speeds.observations()) == 1


async def test_an_engine_that_dies_in_a_stream_is_no_observation(tmp_path: Path):
    async with running(tmp_path, "die_after=35") as node:
        await node.start()
        with pytest.raises(ConnectionResetError):
            await node.generate()
        await wait_until(lambda: not node.speeds._due, what="looked at")
        assert node.changes == 0


async def test_a_coordinator_whose_file_is_gone_is_not_watched(tmp_path: Path):
    async with running(tmp_path) as node:
        node.gone.add("llama")
        await node.start()
        await node.generate()
        assert node.speeds.observed_ms("p") == 0.0
        assert not node.speeds._due


async def test_a_coordinator_is_watched_from_the_moment_its_model_is_listed(tmp_path: Path):
    """As after a restart: engines are taken up before their models have been found again."""
    async with running(tmp_path) as node:
        await node.start()
        await node.generate()
        await node.observed()
    async with running(tmp_path) as node:
        node.gone.add("llama")
        with capture_logs() as logs:
            await node.start()
            await node.generate()
            assert [node.speeds.observed_ms("p") for _ in range(3)] == [0.0] * 3
        assert [entry["event"] for entry in logs].count("speed_not_watched") == 1

        node.gone.clear()

        assert node.speeds.observed_ms("p") == pytest.approx(MS, rel=0.5)
        await node.generate()  # beside what nobody has watched: not counted
        await wait_until(lambda: node.speeds._watched["p"].meter._clean, what="it is looked at")
        assert node.changes == 0
        await node.generate()
        await node.observed()


async def test_backends_and_streams_of_strangers_are_left_alone(tmp_path: Path):
    async with running(tmp_path) as node:
        backend = Instance(instance_id="p.backend", model="", state=InstanceState.READY, kind=InstanceKind.BACKEND)
        node.speeds.instance_changed(backend)
        node.speeds.instance_changed(replace(backend, instance_id="unknown", kind=InstanceKind.COORDINATOR))
        node.speeds.streams_changed("unknown", 1)
        node.speeds.streams_changed("unknown", 0)
        assert (node.speeds._watched, node.speeds._due) == ({}, set())


def test_streams_are_counted_by_instance_however_they_end():
    streams, heard = Streams(), []
    streams.subscribe(lambda *change: heard.append(change))
    with streams.counted("p"), contextlib.suppress(ValueError), streams.counted("p"):
        assert streams.active("p") == 2
        raise ValueError
    assert (streams.active("p"), streams.active("q")) == (0, 0)
    assert heard == [("p", 1), ("p", 2), ("p", 1), ("p", 0)]
