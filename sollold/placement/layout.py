"""Ways to lay one model over one node's devices: the last layers on GPUs, the front ones on the CPU.

One `Layouts` serves every node that has the same model: what a split needs does not depend on whose devices they are.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

from msgspec import Struct
from sollol.memory import bytes_read_per_token, device_shares
from sollol.report import CoordinatorPlan, Device, DeviceKind, DeviceShare, ModelShape, ScorePart

# Read bandwidth to assume where an agent has measured none: a desktop's two channels of DDR4, a small discrete GPU.
# A GPU in unified memory reads that memory: the CPU's figure is its figure.
DEFAULT_CPU_BANDWIDTH = 20e9
DEFAULT_GPU_BANDWIDTH = 200e9
# Kept per model: splits over several GPUs, and GPUs' names.
MAX_KNOWN = 4096
MAX_NAMES = 64

# Device ids and how many layers each holds, the CPU first. The kinds follow from that and stay out of the key.
Split = tuple[tuple[str, int], ...]


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
    if len(layout.shares) == 1:
        return layout.total_bytes <= devices[0].free_bytes
    on_host = 0
    cpu = devices[0]
    for share, device in _held(layout, devices):
        if share.total_bytes > device.free_bytes:
            return False
        if device is cpu or device.unified:
            on_host += share.total_bytes
    return on_host <= cpu.free_bytes


def read_ms(layout: Layout, devices: Sequence[Device]) -> float:
    """Milliseconds per token that the devices spend reading, one after the other."""
    if len(layout.shares) == 1:
        return layout.read_bytes[0] / bandwidth(devices[0], devices[0]) * 1000
    pairs = zip(layout.read_bytes, _held(layout, devices), strict=True)
    return sum([size / bandwidth(device, devices[0]) * 1000 for size, (_, device) in pairs])


def read_parts(layout: Layout, devices: Sequence[Device]) -> list[ScorePart]:
    """The same by device, zero for a usable one that holds nothing."""
    cpu = devices[0]
    if len(devices) == 1:
        return [ScorePart("read_ms." + cpu.device_id, layout.read_bytes[0] / bandwidth(cpu, cpu) * 1000)]
    read = {share.device_id: size for share, size in zip(layout.shares, layout.read_bytes, strict=True)}
    return [
        ScorePart("read_ms." + device.device_id, read.get(device.device_id, 0) / bandwidth(device, cpu) * 1000)
        for device in devices
        if device.usable or device is cpu
    ]


def _held(layout: Layout, devices: Sequence[Device]) -> list[tuple[DeviceShare, Device]]:
    """Each share with its device: both are in the engine's order."""
    rest = iter(devices)
    found = []
    for share in layout.shares:
        device = next(rest)
        while device.device_id != share.device_id:
            device = next(rest)
        found.append((share, device))
    return found


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
        self._alone: dict[str, Layout] = {}
        self._pairs: dict[tuple[str, str], list[Layout | None]] = {}

    def best(self, devices: Sequence[Device]) -> Layout | None:
        """The layout with the least predicted milliseconds per token of those that fit; the first of equals."""
        if len(devices) == 1:
            alone = self._alone.get(devices[0].device_id) or self.on_cpu(devices[0])
            return alone if alone.total_bytes <= devices[0].free_bytes else None
        if len(devices) == 2:
            quick = self._on_faster_gpu(devices[0], devices[1])
            if quick is not None and fits(quick, devices):
                return quick
        best: Layout | None = None
        least = 0.0
        for layout in self._candidates(devices):
            if fits(layout, devices):
                cost = read_ms(layout, devices)
                if best is None or cost < least:
                    best, least = layout, cost
        return best

    def on_cpu(self, cpu: Device) -> Layout:
        layout = self._alone.get(cpu.device_id)
        if layout is None:
            layout = self._alone[cpu.device_id] = self._of(((cpu.device_id, self.all_layers),))
        return layout

    def most_layers(self, devices: Sequence[Device]) -> int:
        """How many layers all devices together could hold, when that is not all of them."""
        cpu = devices[0]
        beside = self._beside(cpu.device_id, "GPU")

        def front(count: int) -> int:
            """What the CPU needs for the first `count` layers when a GPU holds the rest."""
            return self._with(beside, cpu.device_id, "GPU", self.all_layers - count).shares[0].total_bytes

        if front(0) > cpu.free_bytes:
            return 0  # the embeddings and buffers that every layout keeps on the CPU do not fit
        on_cpu = bisect_right(range(1, self.all_layers), cpu.free_bytes, key=front)
        gpus = [gpu for gpu in _usable_gpus(devices) if not gpu.unified]
        return min(on_cpu + sum(self._filled(cpu, gpus).values()), self.all_layers - 1)

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

    def _candidates(self, devices: Sequence[Device]) -> Iterator[Layout]:
        """As much as fits on each GPU alone, the fastest first; on all of them together; all on the CPU."""
        cpu = devices[0]
        gpus = _usable_gpus(devices)
        for gpu in _fastest_first(gpus, cpu):
            layout = self._with_one(cpu, gpu)
            if layout is not None:
                yield layout
        if len(gpus) > 1:
            filled = self._filled(cpu, gpus)
            if len(filled) > 1:
                yield self._of(self._split(cpu, gpus, filled))
        yield self.on_cpu(cpu)

    def _on_faster_gpu(self, cpu: Device, gpu: Device) -> Layout | None:
        """The usual node: nothing can beat as much as fits on its only GPU, when that reads faster than the CPU."""
        if gpu.kind is DeviceKind.GPU and gpu.usable and bandwidth(gpu, cpu) >= bandwidth(cpu, cpu):
            return self._with_one(cpu, gpu)
        return None

    def _with_one(self, cpu: Device, gpu: Device) -> Layout | None:
        """As many of the last layers as this GPU can hold; None when not one fits."""
        beside = self._beside(cpu.device_id, gpu.device_id)

        def needed(count: int) -> int:
            return self._with(beside, cpu.device_id, gpu.device_id, count).shares[1].total_bytes

        if needed(self.all_layers) <= gpu.free_bytes:
            return beside[self.all_layers]
        count = bisect_right(range(1, self.all_layers), gpu.free_bytes, key=needed)
        return beside[count] if count else None

    def _beside(self, cpu_id: str, gpu_id: str) -> list[Layout | None]:
        """The layouts over a CPU and one GPU by the number of layers on the GPU, as far as they are known."""
        known = self._pairs.get((cpu_id, gpu_id))
        if known is None:
            if len(self._pairs) >= MAX_NAMES:
                self._pairs.clear()
            known = self._pairs[cpu_id, gpu_id] = [None] * (self.all_layers + 1)
        return known

    def _with(self, beside: list[Layout | None], cpu_id: str, gpu_id: str, count: int) -> Layout:
        layout = beside[count]
        if layout is None:
            layout = beside[count] = self._computed(((cpu_id, self.all_layers - count), (gpu_id, count)))
        return layout

    def _filled(self, cpu: Device, gpus: Sequence[Device]) -> dict[str, int]:
        """Layers per GPU when each, the fastest first, takes all it can hold beside what those before it took."""
        filled: dict[str, int] = {}
        for gpu in _fastest_first(gpus, cpu):
            low, high = 0, self.all_layers - sum(filled.values()) + 1  # low layers fit, high ones do not
            middle = high - 1  # all that are left, the usual answer, is tried first
            while low < middle:
                if self._gpus_hold(cpu, gpus, {**filled, gpu.device_id: middle}):
                    low = middle
                else:
                    high = middle
                middle = (low + high) // 2
            if low:
                filled[gpu.device_id] = low
        return filled

    def _gpus_hold(self, cpu: Device, gpus: Sequence[Device], filled: dict[str, int]) -> bool:
        shares = self._of(self._split(cpu, gpus, filled)).shares
        free = {gpu.device_id: gpu.free_bytes for gpu in gpus}
        return all(share.total_bytes <= free[share.device_id] for share in shares[1:])

    def _split(self, cpu: Device, gpus: Sequence[Device], filled: dict[str, int]) -> Split:
        """The CPU with the rest of the layers, then the GPUs that hold any, in the engine's order."""
        rest = self.all_layers - sum(filled.values())
        held = [(gpu.device_id, filled[gpu.device_id]) for gpu in gpus if filled.get(gpu.device_id)]
        return ((cpu.device_id, rest), *held)

    def _of(self, split: Split) -> Layout:
        layout = self._known.get(split)
        if layout is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            layout = self._known[split] = self._computed(split)
        return layout

    def _computed(self, split: Split) -> Layout:
        kinds = (DeviceKind.CPU, *[DeviceKind.GPU] * (len(split) - 1))
        shares = device_shares(
            self._shape,
            [(device_id, kind, count) for (device_id, count), kind in zip(split, kinds, strict=True)],
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


def _usable_gpus(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.kind is DeviceKind.GPU and device.usable]


def _fastest_first(gpus: Sequence[Device], cpu: Device) -> Sequence[Device]:
    return gpus if len(gpus) == 1 else sorted(gpus, key=lambda gpu: (-bandwidth(gpu, cpu), gpu.device_id))
