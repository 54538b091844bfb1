import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from sollol.correction import Correction, MemoryCorrection
from sollol.engine import Engine, EngineSource
from sollol.errors import Reason, SollolError
from sollol.link import Link
from sollol.registry import Registry, RegistryUnavailable
from sollol.report import (
    Device,
    DeviceKind,
    DeviceShare,
    Instance,
    InstanceKind,
    InstanceState,
    Model,
    Report,
)
from sollol.speed import SpeedObservation
from structlog.testing import capture_logs

from agent import reporter as reporter_module
from agent.config import AgentConfig
from agent.ledger import Ledger
from agent.materialised import anonymous_bytes, materialised
from agent.reporter import Reporter
from tests.notice_board import reports
from tests.waiting import wait_until

CPU = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=1000, free_bytes=800, measured_free_bytes=800)
CUDA = Device(device_id="CUDA0", kind=DeviceKind.GPU, total_bytes=500, free_bytes=400, measured_free_bytes=400)
ENGINE = Engine(source=EngineSource.PATH, path="/usr/bin/llama-server", build="b1")
LLAMA = Model(name="llama", size_bytes=5, identity="1")
LEARNED = MemoryCorrection(
    identity="1",
    context_per_slot=512,
    parallel=1,
    kv_type="f16",
    ubatch=512,
    layout="CPU:9",
    correction=Correction(weights=1.2),
)


class Node:
    """What a reporter gathers from: everything it asks, in the test's hand. Heartbeats are far apart unless set."""

    def __init__(self, registry=None, **settings) -> None:
        self.devices = (CPU, CUDA)
        self.models: tuple[Model, ...] = (LLAMA,)
        self.running: tuple[Instance, ...] = ()
        self.links: tuple[Link, ...] = ()
        self.speeds: tuple[SpeedObservation, ...] = ()
        self.learned: tuple[MemoryCorrection, ...] = ()
        self.cordoned = self.draining = False
        self.measurements = self.scans = 0
        self.go_on_scanning, self.go_on_measuring = threading.Event(), asyncio.Event()
        self.go_on_scanning.set()
        self.go_on_measuring.set()
        self.ledger = Ledger(clock=asyncio.get_running_loop().time, journal=lambda _event: self.reporter.changed())
        self.reporter = Reporter(
            config=AgentConfig(
                **{"node_id": "laptop", "heartbeat_s": 60.0, "lease_s": 120.0, "rescan_s": 60.0, **settings}
            ),
            probe=self,
            inventory=self,
            ledger=self.ledger,
            supervisor=self,
            links=self,
            speeds=self,
            learned=self,
            cordon=self,
            engine=ENGINE,
            registry=registry,
            wall_clock=lambda: 1_700_000_000.0,
        )

    async def measure(self) -> tuple[Device, ...]:
        self.measurements += 1
        devices = self.devices
        await self.go_on_measuring.wait()
        return devices

    def scan(self) -> tuple[Model, ...]:
        self.scans += 1
        self.go_on_scanning.wait(10)
        if self.models == ("broken",):
            raise PermissionError("models: permission denied")
        return (*self.models,)  # a new object each time, as of a real look

    def corrections(self) -> tuple[MemoryCorrection, ...]:
        return self.learned

    def instances(self) -> tuple[Instance, ...]:
        return self.running

    def all(self) -> tuple[Link, ...]:
        return self.links

    def observations(self) -> tuple[SpeedObservation, ...]:
        return self.speeds


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[Reporter]:
    task = asyncio.create_task(node.reporter.run())
    try:
        async with asyncio.timeout(10):
            await node.reporter.ready()
        yield node.reporter
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(reporter: Reporter, condition, what: str) -> Report:
    await wait_until(lambda: condition(reporter.current()), what=what)
    return reporter.current()


async def test_a_report_says_all_that_the_node_knows_of_itself():
    node = Node(host="192.168.1.20", port=7462, labels={"rack": "attic"})
    node.running = (Instance(instance_id="p", model="llama", state=InstanceState.READY),)
    node.links = (Link(node_id="bigbox", rtt_s=0.001, bytes_per_s=1e8, age_s=3.0),)
    node.learned = (LEARNED,)
    node.speeds = (SpeedObservation(identity="1", devices=("CPU x2",), layers=(9,), kv_type="f16", ms_per_token=12.5),)
    async with running(node) as reporter:
        report = reporter.current()
    assert (report.links, report.speeds, report.memory) == (node.links, node.speeds, node.learned)
    assert (report.node_id, report.address, report.labels) == ("laptop", "192.168.1.20:7462", {"rack": "attic"})
    assert (report.engine, report.models, report.instances) == (ENGINE, (LLAMA,), node.running)
    assert (report.sequence, report.measured_unix_s, report.version) == (1, 1_700_000_000.0, "0.1.0")
    assert report.devices == (CPU, CUDA)
    assert report.cpu_count == len(os.sched_getaffinity(0))
    assert len(report.boot_id) == 36


async def test_gpus_that_take_their_memory_from_the_cpus_are_known_once_they_are_measured():
    node = Node()
    node.devices = (CPU, CUDA, replace(CUDA, device_id="ROCm0", unified=True))
    assert node.reporter.unified_gpus() == frozenset()
    async with running(node) as reporter:
        assert reporter.unified_gpus() == {"ROCm0"}


async def test_before_the_first_measurement_there_is_no_report():
    with pytest.raises(SollolError) as caught:
        Node().reporter.current()
    assert caught.value.refusal.reason is Reason.STALE_REPORT


async def test_a_promise_shows_in_the_next_report_at_once():
    node = Node()
    async with running(node) as reporter:
        node.ledger.reserve("p", {"CPU": 300}, 30, reporter.current().devices)
        report = await until(reporter, lambda now: now.reservations, "the reservation is reported")
        assert (report.devices[0].reserved_bytes, report.devices[0].free_bytes) == (300, 500)


async def test_changes_that_come_together_are_one_report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporter_module, "REPORT_GAP_S", 0.3)
    node, clock = Node(), asyncio.get_running_loop().time
    async with running(node) as reporter:
        before, begun_s = reporter.current().sequence, clock()
        for _ in range(100):
            reporter.changed()
            await asyncio.sleep(0)
        report = await until(reporter, lambda now: now.sequence > before, "one more report")
        assert report.sequence - before <= 1 + (clock() - begun_s) / 0.3


async def test_a_change_while_it_is_being_measured_is_in_the_report_after_that():
    node = Node()
    async with running(node) as reporter:
        before = node.measurements
        node.go_on_measuring.clear()
        reporter.changed()
        await wait_until(lambda: node.measurements > before, what="it measures")
        node.devices = (CPU,)
        reporter.changed()
        node.go_on_measuring.set()
        await until(reporter, lambda now: now.devices == (CPU,), "the change is reported")


async def test_it_reports_every_heartbeat_without_any_change():
    node = Node(heartbeat_s=0.1)
    async with running(node) as reporter:
        await until(reporter, lambda now: now.sequence >= 4, "four reports")


async def test_a_watcher_gets_the_newest_at_once_and_a_slow_one_skips_to_the_newest():
    node = Node()
    async with running(node) as reporter:
        watch = reporter.watch()
        first = await anext(watch)
        assert first is reporter.current()
        for count in range(2, 5):
            reporter.changed()
            await until(reporter, lambda now, count=count: now.sequence >= count, "a newer report")
        assert (await anext(watch)) is reporter.current()
        pending = asyncio.ensure_future(anext(watch))
        reporter.changed()
        async with asyncio.timeout(5):
            assert (await pending).sequence > 4
        await watch.aclose()


async def test_new_models_are_found_and_an_unchanged_list_stays_the_same_object():
    node = Node(rescan_s=0.1)
    async with running(node) as reporter:
        before = reporter.current().models
        await wait_until(lambda: node.scans >= 3, what="three scans")
        assert reporter.current().models is before
        node.models = (LLAMA, Model(name="qwen", size_bytes=6, identity="2"))
        await until(reporter, lambda now: len(now.models) == 2, "the new model is reported")


async def test_directories_that_cannot_be_read_keep_the_models_found_before_and_are_told_once():
    node = Node(rescan_s=0.1)
    with capture_logs() as logs:
        async with running(node) as reporter:
            node.models = ("broken",)
            await wait_until(lambda: node.scans >= 4, what="three more scans")
            assert reporter.current().models == (LLAMA,)
    assert [entry["event"] for entry in logs] == ["model_scan_failed"]


async def test_a_hanging_disk_does_not_keep_the_node_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporter_module, "FIRST_SCAN_WITHIN_S", 0.05)
    monkeypatch.setattr(reporter_module, "OVERDUE_SCAN_POLL_S", 0.05)
    node = Node()
    node.go_on_scanning.clear()
    async with running(node) as reporter:
        assert reporter.current().models == ()
        node.go_on_scanning.set()
        await until(reporter, lambda now: now.models == (LLAMA,), "the late scan is reported")
        assert node.scans == 1


async def test_the_registry_has_the_report_while_the_agent_runs_and_not_afterwards(clean_redis: str):
    registry = Registry(clean_redis)
    node = Node(registry)

    def published() -> bool:
        return reports(clean_redis) == (node.reporter.current(),)

    async with running(node) as reporter:
        await wait_until(published, what="the first report is in the registry")
        reporter.changed()
        await until(reporter, lambda now: now.sequence > 1, "a newer report")
        await wait_until(published, what="the newer report is in the registry")
    assert reports(clean_redis) == ()
    await registry.close()


class LostBoard:
    """A registry that is away until told otherwise."""

    def __init__(self) -> None:
        self.away = True
        self.attempts, self.taken = 0, False
        self.published: list[int] = []

    async def publish(self, report: Report, _lease_s: float) -> bool:
        self.attempts += 1
        if self.away:
            raise RegistryUnavailable("nobody there")
        self.published.append(report.sequence)
        return not self.taken

    async def withdraw(self, _report: Report) -> None:
        raise RegistryUnavailable("nobody there")


async def test_a_lost_registry_stops_no_report_and_is_told_once_per_outage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporter_module, "PUBLISH_GAP_S", 0.01)
    board = LostBoard()
    node = Node(board, heartbeat_s=0.1)
    with capture_logs() as logs:
        async with running(node) as reporter:
            await wait_until(lambda: board.attempts >= 3, what="three attempts")
            assert reporter.current().sequence >= 3
            board.away = False
            await wait_until(lambda: board.published, what="the registry has a report again")
    assert [entry["event"] for entry in logs] == ["registry_lost", "registry_regained", "report_not_withdrawn"]


async def test_a_running_agent_whose_name_another_has_in_the_registry_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(reporter_module, "PUBLISH_GAP_S", 0.01)
    board = LostBoard()
    board.away, board.taken = False, True
    with capture_logs() as logs:
        async with running(Node(board, heartbeat_s=0.05)):
            await wait_until(lambda: board.attempts >= 3, what="three attempts")
    assert [entry["event"] for entry in logs] == ["node_id_in_use", "report_not_withdrawn"]


async def test_a_registry_that_hangs_does_not_hold_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporter_module, "WITHDRAW_WITHIN_S", 0.05)

    class HangingBoard:
        async def publish(self, _report: Report, _lease_s: float) -> bool:
            await asyncio.Event().wait()
            return True

        async def withdraw(self, _report: Report) -> None:
            await asyncio.Event().wait()

    node = Node(HangingBoard())
    async with asyncio.timeout(5):
        async with running(node) as reporter:
            reporter.changed()
            await until(reporter, lambda now: now.sequence >= 2, "reports go on")


def instance(state: InstanceState, pid: int = 7) -> Instance:
    shares = (
        DeviceShare(device_id="CPU", layers=1, total_bytes=300),
        DeviceShare(device_id="CUDA0", layers=2, total_bytes=100),
    )
    return Instance(instance_id="p", model="llama", state=state, pid=pid, shares=shares)


@pytest.mark.parametrize(
    ("state", "anonymous", "expected"),
    [
        (InstanceState.READY, 50, {"p": {"CPU": 50, "CUDA0": 100}}),
        (InstanceState.READY, 900, {"p": {"CPU": 300, "CUDA0": 100}}),
        (InstanceState.STARTING, 50, {"p": {"CPU": 50, "CUDA0": 0}}),
        (InstanceState.LOST, 50, {"p": {"CPU": 50, "CUDA0": 0}}),
        (InstanceState.FAILED, 50, {}),
    ],
)
def test_what_an_engine_took_is_its_anonymous_memory_and_once_ready_its_gpu_share(state, anonymous, expected):
    assert materialised([instance(state)], lambda _pid: anonymous) == expected


def test_a_coordinator_and_a_backend_of_one_pool_add_up_and_other_nodes_shares_do_not():
    elsewhere = DeviceShare(device_id="CPU", layers=9, total_bytes=5000, node_id="n2")
    coordinator = replace(instance(InstanceState.READY), shares=(*instance(InstanceState.READY).shares, elsewhere))
    backend = replace(
        instance(InstanceState.READY, pid=8), instance_id="p.backend", pool_id="p", kind=InstanceKind.BACKEND
    )
    taken = materialised([coordinator, backend], {7: 40, 8: 60}.__getitem__)
    assert taken == {"p": {"CPU": 100, "CUDA0": 100}}, "nobody knows when a backend's GPU share is taken"


def test_anonymous_memory_is_read_of_a_live_process_and_zero_of_none():
    assert anonymous_bytes(os.getpid()) > 1_000_000
    assert anonymous_bytes(2**22 + 1) == 0


async def test_a_loaded_engines_bytes_are_missing_and_not_missing_twice():
    node = Node()
    async with running(node) as reporter:
        node.ledger.reserve("p", {"CUDA0": 100}, 30, reporter.current().devices)
        node.ledger.bind("p", "p")
        node.devices = (
            CPU,
            Device(device_id="CUDA0", kind=DeviceKind.GPU, total_bytes=500, free_bytes=300, measured_free_bytes=300),
        )
        node.running = (instance(InstanceState.READY, pid=0),)
        reporter.changed()
        report = await until(reporter, lambda now: now.instances, "the instance is reported")
        assert (report.devices[1].reserved_bytes, report.devices[1].free_bytes) == (100, 300)
        node.ledger.reserve("q", {"CUDA0": 30}, 30, report.devices)
        report = await until(reporter, lambda now: len(now.reservations) == 2, "another promise is reported")
        assert (report.devices[1].reserved_bytes, report.devices[1].free_bytes) == (130, 270)
