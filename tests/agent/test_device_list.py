"""When the engine is asked for its devices again."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sollol.engine import Engine, EngineSource
from sollol.report import Instance, InstanceState
from structlog.testing import capture_logs

from agent.device_list import DeviceList
from agent.engine.devices import EngineDevice
from agent.engine.find import FoundEngine, listed_devices
from tests.waiting import wait_until

GIB = 1 << 30


def gpu(free: int, device_id: str = "Vulkan0") -> EngineDevice:
    return EngineDevice(device_id=device_id, description="Some GPU", total_bytes=16 * GIB, free_bytes=free * GIB)


class Bench:
    """The engine, and the probe: what it is asked for, and what it is told."""

    def __init__(self) -> None:
        self.engine_alone = True
        self.free: int | None = 15
        self.asked = 0
        self.heard: list[int] = []
        self.changes = 0
        self.outdated = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def ask(self) -> tuple[EngineDevice, ...] | None:
        self.asked += 1
        free = self.free
        await self.go_on.wait()
        return None if free is None else (gpu(free),)

    def engine_outdated(self) -> None:
        self.outdated += 1

    def heard_engine(self, devices: Sequence[object]) -> None:
        self.heard += [device.free_bytes // GIB for device in devices]

    def changed(self) -> None:
        self.changes += 1

    @asynccontextmanager
    async def running(self, every_s: float = 60.0) -> AsyncIterator[DeviceList]:
        devices = DeviceList(self.ask, self, self.changed, every_s=every_s)
        task = asyncio.create_task(devices.run())
        try:
            yield devices
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def instance(state: InstanceState) -> Instance:
    return Instance(instance_id="p", model="m", state=state)


@pytest.mark.parametrize("state", [InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED])
async def test_it_asks_when_an_instance_has_taken_or_freed_memory(state: InstanceState):
    bench = Bench()
    async with bench.running() as devices:
        devices.instance_changed(instance(InstanceState.STARTING))
        bench.free = 3
        devices.instance_changed(instance(state))
        await wait_until(lambda: bench.changes, what="a new report")
        assert (bench.heard, bench.asked) == ([3], 1)


async def test_only_the_first_word_of_being_ready_makes_the_list_outdated():
    bench = Bench()
    async with bench.running() as devices:
        for state in (InstanceState.STARTING, InstanceState.READY, InstanceState.READY, InstanceState.STOPPED):
            devices.instance_changed(instance(state))
        assert bench.outdated == 1
        devices.instance_changed(instance(InstanceState.READY))
        assert bench.outdated == 2


async def test_a_list_from_before_an_instance_took_memory_is_not_heard():
    bench = Bench()
    bench.go_on.clear()
    async with bench.running() as devices:
        devices.instance_changed(instance(InstanceState.STOPPED))
        await wait_until(lambda: bench.asked == 1, what="it asks")
        bench.free = 2
        devices.instance_changed(instance(InstanceState.READY))
        bench.go_on.set()
        await wait_until(lambda: bench.changes, what="it has asked again")
        assert bench.heard == [2]


async def test_it_asks_from_time_to_time_and_not_while_drivers_tell_everything():
    bench = Bench()
    bench.engine_alone = False
    async with bench.running(every_s=0.01) as devices:
        devices.instance_changed(instance(InstanceState.READY))
        await wait_until(lambda: not devices._due.is_set(), what="it has looked")
        assert bench.asked == 0
        bench.engine_alone = True
        await wait_until(lambda: bench.changes >= 2, what="it asks by itself")


async def test_an_engine_that_does_not_answer_is_told_once_and_asked_again():
    bench = Bench()
    bench.free = None
    with capture_logs() as logs:
        async with bench.running(every_s=0.01):
            await wait_until(lambda: bench.asked >= 3, what="it goes on asking")
            assert bench.heard == []
            bench.free = 7
            await wait_until(lambda: bench.heard, what="it answers again")
    assert [entry["event"] for entry in logs] == ["engine_lists_no_devices"]


async def test_an_engine_that_is_overdue_once_is_asked_again_at_once_and_not_told_of():
    bench = Bench()
    bench.free = None
    with capture_logs() as logs:
        async with bench.running() as devices:
            bench.go_on.clear()
            devices.instance_changed(instance(InstanceState.READY))
            await wait_until(lambda: bench.asked == 1, what="it asks")
            bench.free = 7
            bench.go_on.set()
            await wait_until(lambda: bench.heard, what="it has asked again")
    assert (bench.heard, bench.asked, logs) == ([7], 2, [])


async def test_a_list_of_other_devices_than_were_found_does_not_count(tmp_path: Path):
    """Plans name the devices that were found: where the order changed, figures would go to the wrong one."""
    script = tmp_path / "llama-server"
    script.write_text("#!/bin/sh\necho 'Available devices:'\necho '  Vulkan0: Some GPU (16384 MiB, 2048 MiB free)'\n")
    script.chmod(0o700)
    engine = Engine(source=EngineSource.CONFIGURED, path=str(script), build="1")
    for known, expected in (((gpu(15),), (gpu(2),)), ((gpu(15), gpu(15, "Vulkan1")), None)):
        found = FoundEngine(engine=engine, argv=(str(script),), devices=known)
        assert await listed_devices(found, {}) == expected
