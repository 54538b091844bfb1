"""Ways to lay one model over one node's devices: the last layers on GPUs, the front ones on the CPU.

One `Layouts` serves every node that has the same model: what a split needs does not depend on whose devices they are.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

from msgspec import Struct
from sollol.memory import bytes_read_per_token, device_shares
from sollol.report import CoordinatorPlan, Device, DeviceKind, DeviceShare, ModelShape

# Read bandwidth to assume where an agent has measured none: a desktop's two channels of DDR4, a small discrete GPU.
# A GPU in unified memory reads that memory: the CPU's figure is its figure.
DEFAULT_CPU_BANDWIDTH = 20e9
DEFAULT_GPU_BANDWIDTH = 200e9

# Splits kept per model: a model has one per number of layers on one GPU, many more over several unequal GPUs.
MAX_KNOWN = 4096

Split = tuple[tuple[str, DeviceKind, int], ...]


class Load(Struct, frozen=True, kw_only=True):
    """What the coordinator shall hold at the same time."""

    context_per_slot: int
    parallel: int
    kv_type: str
    batch: int
    ubatch: int


class Layout(Struct, frozen=True, kw_only=True):
    """One split and what it costs. `read_bytes` are read for each token, by share."""

    shares: tuple[DeviceShare, ...]
    read_bytes: tuple[int, ...]
    total_bytes: int


def bandwidth(device: Device, cpu: Device) -> float:
    """Bytes per second, measured or assumed."""
    if device.bandwidth_bytes_per_s > 0:
        return device.bandwidth_bytes_per_s
    if device.kind is DeviceKind.GPU and not device.unified:
        return DEFAULT_GPU_BANDWIDTH
    return cpu.bandwidth_bytes_per_s or DEFAULT_CPU_BANDWIDTH


def fits(layout: Layout, devices: Sequence[Device]) -> bool:
    """Whether every share finds its bytes free; GPUs in unified memory take theirs out of the CPU's."""
    cpu = devices[0]
    if len(layout.shares) == 1:
        return layout.total_bytes <= cpu.free_bytes
    by_id = {device.device_id: device for device in devices}
    on_host = 0
    for share in layout.shares:
        device = by_id[share.device_id]
        if share.total_bytes > device.free_bytes:
            return False
        if device is cpu or device.unified:
            on_host += share.total_bytes
    return on_host <= cpu.free_bytes


@lru_cache(maxsize=32)
def layouts_for(shape: ModelShape, load: Load) -> "Layouts":
    """The layouts of a model, kept from one decision to the next: what they need never changes."""
    return Layouts(shape, load)


class Layouts:
    """Every layout of one model that was looked at, kept so that the next node finds it ready."""

    def __init__(self, shape: ModelShape, load: Load) -> None:
        self._shape = shape
        self._load = load
        self._context_per_slot = min(load.context_per_slot, shape.context_length or load.context_per_slot)
        self.all_layers = shape.layers + 1  # the output layer is one more
        self._known: dict[Split, Layout] = {}

    def of(self, split: Split) -> Layout:
        layout = self._known.get(split)
        if layout is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            layout = self._known[split] = self._computed(split)
        return layout

    def best(self, devices: Sequence[Device]) -> Layout | None:
        """The layout with the least predicted milliseconds per token of those that fit; the first of equals."""
        if len(devices) == 1:
            alone = self.on_cpu(devices[0])
            return alone if alone.total_bytes <= devices[0].free_bytes else None
        best: Layout | None = None
        least = 0.0
        for layout in self._candidates(devices):
            if fits(layout, devices):
                cost = sum(value for _, value in read_parts(layout, devices))
                if best is None or cost < least:
                    best, least = layout, cost
        return best

    def on_cpu(self, cpu: Device) -> Layout:
        return self.of(((cpu.device_id, DeviceKind.CPU, self.all_layers),))

    def most_layers(self, devices: Sequence[Device]) -> int:
        """How many layers all devices together could hold, when that is not all of them."""
        cpu = devices[0]
        gpus = [device for device in _gpus(devices) if not device.unified]
        if self._front(0).total_bytes > cpu.free_bytes:
            return 0  # the embeddings and buffers that every layout keeps on the CPU do not fit
        on_cpu = bisect_right(
            range(1, self.all_layers), cpu.free_bytes, key=lambda count: self._front(count).total_bytes
        )
        return min(on_cpu + sum(self._filled(devices, gpus).values()), self.all_layers - 1)

    def plan(self, model_name: str, layout: Layout) -> CoordinatorPlan:
        load = self._load
        return CoordinatorPlan(
            model=model_name,
            parallel=load.parallel,
            context_per_slot=self._context_per_slot,
            shares=layout.shares,
            kv_type=load.kv_type,
            batch=load.batch,
            ubatch=load.ubatch,
        )

    def _front(self, count: int) -> DeviceShare:
        """The CPU's share when it holds the first `count` layers and others the rest."""
        return self.of((("CPU", DeviceKind.CPU, count), ("rest", DeviceKind.GPU, self.all_layers - count))).shares[0]

    def _candidates(self, devices: Sequence[Device]) -> Iterator[Layout]:
        """As much as fits on the fastest GPU alone, on each other one alone, on all together; then the CPU alone."""
        cpu = devices[0]
        gpus = _gpus(devices)
        fastest_first = sorted(gpus, key=lambda gpu: (-bandwidth(gpu, cpu), gpu.device_id))
        groups = [[gpu] for gpu in fastest_first]
        if len(groups) > 1:
            groups.append(fastest_first)
        for group in groups:
            counts = self._filled(devices, group)
            if counts:
                yield self.of(self._split(devices, counts))
        yield self.on_cpu(cpu)

    def _filled(self, devices: Sequence[Device], gpus: Sequence[Device]) -> dict[str, int]:
        """Layers per GPU when each in turn takes as many as it can hold."""
        counts: dict[str, int] = {}
        for gpu in gpus:
            left = self.all_layers - sum(counts.values())
            most = self._most(devices, counts, gpu, left)
            if most:
                counts[gpu.device_id] = most
        return counts

    def _most(self, devices: Sequence[Device], counts: dict[str, int], gpu: Device, left: int) -> int:
        """The most layers, up to `left`, that `gpu` can take beside what the other GPUs already hold."""
        if self._gpus_hold(devices, {**counts, gpu.device_id: left}):
            return left
        low, high = 0, left  # low layers fit, high layers do not
        while high - low > 1:
            middle = (low + high) // 2
            if self._gpus_hold(devices, {**counts, gpu.device_id: middle}):
                low = middle
            else:
                high = middle
        return low

    def _gpus_hold(self, devices: Sequence[Device], counts: dict[str, int]) -> bool:
        free = {device.device_id: device.free_bytes for device in devices}
        shares = self.of(self._split(devices, counts)).shares[1:]
        return all(share.total_bytes <= free[share.device_id] for share in shares)

    def _split(self, devices: Sequence[Device], counts: dict[str, int]) -> Split:
        """The CPU with the rest of the layers, then the GPUs that hold any, in the engine's order."""
        rest = self.all_layers - sum(counts.values())
        held = [(gpu.device_id, gpu.kind, counts[gpu.device_id]) for gpu in devices[1:] if counts.get(gpu.device_id)]
        return ((devices[0].device_id, DeviceKind.CPU, rest), *held)

    def _computed(self, split: Split) -> Layout:
        shares = device_shares(
            self._shape,
            split,
            context_per_slot=self._context_per_slot,
            parallel=self._load.parallel,
            kv_type=self._load.kv_type,
            ubatch=self._load.ubatch,
        )
        return Layout(
            shares=shares,
            read_bytes=tuple(bytes_read_per_token(self._shape, share) for share in shares),
            total_bytes=sum(share.total_bytes for share in shares),
        )


def _gpus(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.kind is DeviceKind.GPU and device.usable]


def read_parts(layout: Layout, devices: Sequence[Device]) -> list[tuple[str, float]]:
    """Milliseconds per token that each usable device spends reading, by device id, zero included."""
    cpu = devices[0]
    if len(devices) == 1:
        return [(cpu.device_id, layout.read_bytes[0] / bandwidth(cpu, cpu) * 1000)]
    read = {share.device_id: size for share, size in zip(layout.shares, layout.read_bytes, strict=True)}
    return [
        (device.device_id, read.get(device.device_id, 0) / bandwidth(device, cpu) * 1000)
        for device in devices
        if device.usable or device is cpu
    ]
