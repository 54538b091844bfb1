"""Measures this node's devices: the CPU from the system and our cgroup, GPUs from their drivers and the engine.

Nothing here knows of promises: `free_bytes` equals `measured_free_bytes` until the ledger has had its say.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import structlog
from msgspec.structs import replace
from sollol.report import Device, DeviceKind

from agent.bandwidth import boot_id, cpu_bandwidth
from agent.cgroup import cgroup_memory
from agent.engine_devices import EngineDevice, match, shares_ram, vendor_of
from agent.gpus import Driver, DriverLost, Gpu
from agent.threads import Reading, SlowReading

log = structlog.get_logger(__name__)

CPU_ID = "CPU"
DRIVER_WITHIN_S = 2.0
UNCONFIRMED_S = 30.0  # a driver silent for longer offers no memory: its GPU hangs
_SLICE_BELOW = 8  # an engine that sees an eighth less than the driver has a part of the GPU: MIG, or a virtual one
_UNIFIED_BELOW = 4  # a driver that sees less than a quarter of what the engine does counts a carve-out, not the memory


class Probe:
    """Owner of the drivers and of what the engine said last.

    Args:
        drivers: Asked at every measurement, each in its own thread.
        caps: Device id to the most bytes that may be used there.
        state_dir: Where the measured bandwidth is kept.
        threads: Those of an engine: the CPU's bandwidth is theirs.
        environ: Of engines: it says which GPUs they see.
        root: Where `proc` and `sys` are mounted.
    """

    def __init__(
        self,
        *,
        drivers: Sequence[Driver],
        caps: Mapping[str, int],
        state_dir: Path,
        threads: int,
        environ: Mapping[str, str] | None = None,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caps = dict(caps)
        self._state_dir = state_dir
        self._threads = threads
        self._environ = environ or {}
        self._root = root
        self._clock = clock
        self._drivers = tuple(_DriverWatch(driver, clock) for driver in drivers)
        self._engine: tuple[EngineDevice, ...] = ()
        self._engine_heard_s = clock()
        self._engine_is_outdated = False
        self._pairs: list[tuple[EngineDevice | None, Gpu | None]] = []
        self._told_alone: set[str] = set()
        self._told_caps: set[str] = set()
        self._bandwidth: float | None = None
        self._cpu_name = _cpu_name(root)

    def set_caps(self, caps: Mapping[str, int]) -> None:
        """From the next measurement on."""
        self._caps = dict(caps)

    def heard_engine(self, devices: Sequence[EngineDevice]) -> None:
        """Take the engine's newest list of devices: these are the usable ones, under the engine's names."""
        self._engine = tuple(devices)
        self._engine_heard_s = self._clock()
        self._engine_is_outdated = False

    def engine_outdated(self) -> None:
        """What it alone knows counts for nothing until its next list: an engine has taken memory since."""
        self._engine_is_outdated = True

    @property
    def engine_alone(self) -> bool:
        """Whether the engine alone knows what is free on one of its devices; known after the first measurement."""
        return any(engine is not None and _only_engine_knows(engine, gpu) for engine, gpu in self._pairs)

    async def measure(self) -> tuple[Device, ...]:
        """The CPU first, then GPUs in the engine's order, then those that it cannot use.

        Returns within a few seconds even when a driver hangs: its last figures then stand, with their age. The first
        call also measures the CPU's bandwidth, at most once per boot.
        """
        readings = await asyncio.gather(*(driver.newest() for driver in self._drivers))
        cpu = self._cpu()
        if self._bandwidth is None:
            self._bandwidth = await asyncio.to_thread(
                cpu_bandwidth,
                self._state_dir,
                boot=boot_id(self._root),
                free_bytes=cpu.measured_free_bytes,
                threads=self._threads,
            )
        cpu = replace(cpu, bandwidth_bytes_per_s=self._bandwidth)
        ages = {id(gpu): reading.age_s for reading in readings for gpu in reading.value}
        pairs = self._pairs = match(self._engine, [gpu for reading in readings for gpu in reading.value], self._environ)
        self._tell_alone()
        gpus = (self._gpu(engine, gpu, ages.get(id(gpu), 0.0), cpu) for engine, gpu in pairs)
        devices = tuple(self._capped(device) for device in (cpu, *gpus))
        self._tell_caps_of_nothing(devices)
        return devices

    def _tell_alone(self) -> None:
        """Once for each device of a vendor whose driver we would rather ask."""
        why = {driver.vendor: driver.problem for driver in self._drivers}
        for engine, gpu in self._pairs:
            if engine is None or gpu is not None or engine.device_id in self._told_alone:
                continue
            if (vendor := vendor_of(engine)) in why:
                self._told_alone.add(engine.device_id)
                problem = why[vendor] or "its driver tells of no such GPU"
                log.warning("gpu_known_to_engine_only", device=engine.device_id, vendor=vendor, problem=problem)

    def _cpu(self) -> Device:
        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
        limit = cgroup_memory(self._root)
        if limit is not None:
            total, free = min(total, limit.total_bytes), min(free, limit.free_bytes)
        return Device(
            device_id=CPU_ID,
            kind=DeviceKind.CPU,
            name=self._cpu_name,
            total_bytes=total,
            free_bytes=free,
            measured_free_bytes=free,
        )

    def _gpu(self, engine: EngineDevice | None, gpu: Gpu | None, age_s: float, cpu: Device) -> Device:
        if gpu is None:
            assert engine is not None
            return self._engines_own(engine, cpu)
        device = _from_driver(gpu, age_s, cpu)
        if engine is None:
            return replace(device, usable=False)
        device = replace(device, device_id=engine.device_id, name=engine.description or device.name)
        if not device.unified and device.total_bytes * _UNIFIED_BELOW < engine.total_bytes:
            return _on_ram(device, engine.total_bytes, None, cpu)
        return self._slice(device, engine) if _is_slice(device, engine) else device

    def _slice(self, device: Device, engine: EngineDevice) -> Device:
        """The driver tells of the whole GPU, the engine of its part, as long ago as it was asked: the less counts."""
        free = min(device.measured_free_bytes, self._engines_free_bytes(engine))
        return replace(
            device,
            total_bytes=engine.total_bytes,
            free_bytes=free,
            measured_free_bytes=free,
            age_s=max(device.age_s, self._clock() - self._engine_heard_s),
        )

    def _engines_own(self, engine: EngineDevice, cpu: Device) -> Device:
        """A device that only the engine knows (Vulkan, Metal): its figures are as old as its list."""
        free = self._engines_free_bytes(engine)
        device = Device(
            device_id=engine.device_id,
            kind=DeviceKind.GPU,
            name=engine.description,
            vendor=vendor_of(engine),
            total_bytes=engine.total_bytes,
            free_bytes=free,
            measured_free_bytes=free,
            age_s=self._clock() - self._engine_heard_s,
        )
        return _on_ram(device, engine.total_bytes, None, cpu) if shares_ram(engine) else device

    def _engines_free_bytes(self, engine: EngineDevice) -> int:
        return 0 if self._engine_is_outdated else engine.free_bytes

    def _tell_caps_of_nothing(self, devices: Sequence[Device]) -> None:
        """Once each: a cap with a typing error protects nothing. A device can come later, with its driver."""
        there = {device.device_id for device in devices}
        for device_id in self._caps.keys() - there - self._told_caps:
            self._told_caps.add(device_id)
            log.warning("cap_of_no_device", device=device_id, devices=sorted(there))

    def _capped(self, device: Device) -> Device:
        cap = self._caps.get(device.device_id)
        return device if cap is None else replace(device, cap_bytes=cap)


class _DriverWatch:
    """One driver, asked in its own thread; tells once when it hangs or is lost, and once when it is back."""

    def __init__(self, driver: Driver, clock: Callable[[], float]) -> None:
        self._driver, self.vendor = driver, driver.vendor
        self._reading: SlowReading[tuple[Gpu, ...]] = SlowReading(
            driver.read, initial=(), name=f"driver {driver.vendor}", deadline_s=DRIVER_WITHIN_S, clock=clock
        )
        self._silent = False
        self._lost: dict[int, str] = {}

    @property
    def problem(self) -> str:
        return self._driver.problem

    async def newest(self) -> Reading[tuple[Gpu, ...]]:
        problem = ""
        try:
            reading = await self._reading.newest()
        except DriverLost as error:
            problem, reading = str(error), self._reading.last()
        if self._reading.overdue:
            problem = f"no answer within {DRIVER_WITHIN_S} s"
        if problem and not self._silent:
            log.warning("gpu_driver_silent", vendor=self.vendor, problem=problem, age_s=round(reading.age_s, 1))
        elif self._silent and not problem:
            log.info("gpu_driver_back", vendor=self.vendor)
        self._silent = bool(problem)
        self._tell_lost(reading.value)
        return reading

    def _tell_lost(self, gpus: Sequence[Gpu]) -> None:
        lost = {gpu.index: gpu.lost for gpu in gpus if gpu.lost}
        for index in lost.keys() - self._lost.keys():
            log.warning("gpu_lost", vendor=self.vendor, index=index, problem=lost[index])
        self._lost = lost


def _only_engine_knows(engine: EngineDevice, gpu: Gpu | None) -> bool:
    if gpu is None:
        return not shares_ram(engine)
    return gpu.total_bytes is not None and _is_part(engine.total_bytes, gpu.total_bytes)


def _is_part(of_engine_bytes: int, of_driver_bytes: int) -> bool:
    return (of_driver_bytes - of_engine_bytes) * _SLICE_BELOW > of_driver_bytes


def _is_slice(device: Device, engine: EngineDevice) -> bool:
    return not device.unified and _is_part(engine.total_bytes, device.total_bytes)


def _from_driver(gpu: Gpu, age_s: float, cpu: Device) -> Device:
    device = Device(
        device_id=f"{gpu.vendor}{gpu.index}",
        kind=DeviceKind.GPU,
        name=gpu.name,
        vendor=gpu.vendor,
        total_bytes=gpu.total_bytes or 0,
        free_bytes=gpu.free_bytes or 0,
        measured_free_bytes=gpu.free_bytes or 0,
        age_s=age_s,
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s,
    )
    if gpu.unified:
        device = _on_ram(device, gpu.total_bytes, gpu.free_bytes, cpu)
    if gpu.lost or age_s > UNCONFIRMED_S:
        device = replace(device, free_bytes=0, measured_free_bytes=0)
    return device


def _on_ram(device: Device, total_bytes: int | None, free_bytes: int | None, cpu: Device) -> Device:
    """A GPU that works in RAM: it has what the system has free, within what its driver lets it take."""
    total = cpu.total_bytes if total_bytes is None else min(total_bytes, cpu.total_bytes)
    free = cpu.measured_free_bytes if free_bytes is None else min(free_bytes, cpu.measured_free_bytes)
    free = min(free, total)
    return replace(
        device,
        unified=True,
        total_bytes=total,
        free_bytes=free,
        measured_free_bytes=free,
        age_s=0.0 if free_bytes is None else device.age_s,
    )


def _cpu_name(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
