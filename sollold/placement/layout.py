"""Ways to lay one model over one node's devices: the last layers on GPUs, the front ones on the CPU.

One `Layouts` serves every node that has the same model: what a split needs does not depend on whose devices they are.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

from msgspec import Struct
from sollol.memory import bytes_read_per_token, device_shares
from sollol.report import CoordinatorPlan, Device, DeviceKind, DeviceShare, ModelShape, ScorePart

from sollold.placement.corrections import NOTHING_KNOWN, Corrections
from sollold.placement.load import Load

# Read bandwidth to assume where an agent has measured none: a desktop's two channels of DDR4, a small discrete GPU.
# A GPU in unified memory reads that memory: the CPU's figure is its figure.
DEFAULT_CPU_BANDWIDTH = 20e9
DEFAULT_GPU_BANDWIDTH = 200e9
# Kept per model: sets of device names, and splits over each set of several GPUs.
MAX_NAMES = 32
MAX_KNOWN = 1024

K = TypeVar("K")
V = TypeVar("V")

# Device ids and how many layers each holds, the CPU first. The kinds follow from that and stay out of the key.
Split = tuple[tuple[str, int], ...]
Counts = tuple[int, ...]  # layers of each GPU


class Layout(Struct, frozen=True, kw_only=True):
    """One split and what it costs. By device id, for those with a share: bytes needed, and bytes read per token."""

    shares: tuple[DeviceShare, ...]
    needed_bytes: dict[str, int]
    read_bytes: dict[str, int]
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
    needed = layout.needed_bytes
    cpu = devices[0]
    on_host = needed[cpu.device_id]
    for device in devices[1:]:
        size = needed.get(device.device_id, 0)
        if size > device.free_bytes:
            return False
        if device.unified:
            on_host += size
    return on_host <= cpu.free_bytes


def read_ms(layout: Layout, devices: Sequence[Device]) -> float:
    """Milliseconds per token that the devices spend reading, one after the other."""
    cpu = devices[0]
    read = layout.read_bytes
    total = read[cpu.device_id] / bandwidth(cpu, cpu) * 1000
    for device in devices[1:]:
        size = read.get(device.device_id)
        if size is not None:
            total += size / bandwidth(device, cpu) * 1000
    return total


def read_parts(layout: Layout, devices: Sequence[Device]) -> list[ScorePart]:
    """The same by device, zero for a usable one that holds nothing."""
    cpu = devices[0]
    read = layout.read_bytes
    parts = [ScorePart("read_ms." + cpu.device_id, read[cpu.device_id] / bandwidth(cpu, cpu) * 1000)]
    for device in devices[1:]:
        if device.usable:
            size = read.get(device.device_id, 0)
            parts.append(ScorePart("read_ms." + device.device_id, size / bandwidth(device, cpu) * 1000))
    return parts


@lru_cache(maxsize=32)
def layouts_for(shape: ModelShape, load: Load, corrections: Corrections = NOTHING_KNOWN) -> "Layouts":
    """The layouts of a model, kept from one decision to the next: what they need changes only with what is learned."""
    return Layouts(shape, load.within(shape), corrections)


class _Computed(dict[K, V]):
    """Values computed when they are first asked for, and forgotten together when there are `most`."""

    def __init__(self, compute: Callable[[K], V], most: int) -> None:
        self._compute = compute
        self._most = most

    def __missing__(self, key: K) -> V:
        if len(self) >= self._most:
            self.clear()
        found = self[key] = self._compute(key)
        return found


class _Beside:
    """Layouts over a CPU and one GPU, by how many of the last layers the GPU holds, and what those take of the GPU.

    `front`: what the CPU needs for so many of the front layers.
    """

    def __init__(self, layout_of: Callable[[Split], Layout], cpu_id: str, gpu_id: str, all_layers: int) -> None:
        def layout(on_gpu: int) -> Layout:
            return layout_of(((cpu_id, all_layers - on_gpu), (gpu_id, on_gpu)))

        def gpu_needs(on_gpu: int) -> int:
            return self.layouts[on_gpu].shares[1].total_bytes

        def front(on_cpu: int) -> int:
            return self.layouts[all_layers - on_cpu].shares[0].total_bytes

        self.layouts: dict[int, Layout] = _Computed(layout, MAX_KNOWN)
        self.gpu_needs: dict[int, int] = _Computed(gpu_needs, MAX_KNOWN)
        self.front: dict[int, int] = _Computed(front, MAX_KNOWN)


class Layouts:
    """Every layout of one model that was looked at, kept so that the next node finds it ready.

    What a share takes grows with its layers: that is what the searches below rely on. A split that was loaded before
    may take less than its neighbours, and is then found only where these fit too.
    """

    def __init__(self, shape: ModelShape, load: Load, corrections: Corrections) -> None:
        self._shape = shape
        self._load = load
        self._corrections = corrections
        self.all_layers = shape.layers + 1  # the output layer is one more
        whole = self._layout((("CPU", self.all_layers),)).shares[0]
        self._least_bytes = whole.weight_bytes + whole.kv_bytes  # however it is split, and buffers come on top
        self._alone: dict[str, Layout] = _Computed(lambda cpu_id: self._layout(((cpu_id, self.all_layers),)), MAX_NAMES)
        self._pairs: dict[tuple[str, str], _Beside] = _Computed(self._beside, MAX_NAMES)
        self._together: dict[tuple[str, ...], dict[Counts, Layout]] = _Computed(self._among, MAX_NAMES)

    def best(self, devices: Sequence[Device]) -> Layout | None:
        """The layout with the least predicted milliseconds per token of those that fit; the first of equals."""
        cpu = devices[0]
        gpus = _usable_gpus(devices) if len(devices) > 1 else None
        if not gpus:
            alone = self._alone[cpu.device_id]
            return alone if alone.total_bytes <= cpu.free_bytes else None
        order = _fastest_first(gpus, cpu)
        if bandwidth(order[0], cpu) >= bandwidth(cpu, cpu):
            # Nothing reads faster than the whole model on the fastest GPU, or as much of it as fits on the only one.
            layout = self._with_one(cpu, order[0])
            if layout is not None and (len(gpus) == 1 or layout.shares[0].layers == 0) and fits(layout, devices):
                return layout
        if cpu.free_bytes + sum([gpu.free_bytes for gpu in gpus if not gpu.unified]) < self._least_bytes:
            return None
        fitting = [layout for layout in self._candidates(cpu, gpus, order) if fits(layout, devices)]
        return min(fitting, key=lambda layout: read_ms(layout, devices), default=None)

    def on_cpu(self, cpu: Device) -> Layout:
        return self._alone[cpu.device_id]

    def most_layers(self, devices: Sequence[Device]) -> int:
        """How many layers all devices together could hold, when that is not all of them."""
        cpu = devices[0]
        front = self._pairs[cpu.device_id, "GPU"].front
        if front[0] > cpu.free_bytes:
            return 0  # the embeddings and buffers that every layout keeps on the CPU do not fit
        on_cpu = bisect_right(range(1, self.all_layers), cpu.free_bytes, key=front.__getitem__)
        gpus = [gpu for gpu in _usable_gpus(devices) if not gpu.unified]
        if len(gpus) == 1:
            beside = self._with_one(cpu, gpus[0])
            on_gpus = beside.shares[1].layers if beside is not None else 0
        else:
            on_gpus = sum(self._filled(cpu, gpus, _fastest_first(gpus, cpu)))
        return min(on_cpu + on_gpus, self.all_layers - 1)

    def plan(self, model_name: str, layout: Layout) -> CoordinatorPlan:
        load = self._load
        return CoordinatorPlan(
            model=model_name,
            parallel=load.parallel,
            context_per_slot=load.context_per_slot,
            shares=layout.shares,
            kv_type=load.kv_type,
            batch=load.batch,
            ubatch=load.ubatch,
        )

    def _candidates(self, cpu: Device, gpus: Sequence[Device], order: Sequence[Device]) -> Iterator[Layout]:
        """As much as fits on each GPU alone, the fastest first; on all of them together; all on the CPU."""
        for gpu in order:
            layout = self._with_one(cpu, gpu)
            if layout is not None:
                yield layout
        if len(gpus) > 1:
            filled = self._filled(cpu, gpus, order)
            if len(gpus) - filled.count(0) > 1:
                yield self._together[_ids(cpu, gpus)][filled]
        yield self.on_cpu(cpu)

    def _with_one(self, cpu: Device, gpu: Device) -> Layout | None:
        """As many of the last layers as this GPU can hold; None when not one fits."""
        beside = self._pairs[cpu.device_id, gpu.device_id]
        needs = beside.gpu_needs
        if needs[self.all_layers] <= gpu.free_bytes:
            return beside.layouts[self.all_layers]
        count = bisect_right(range(1, self.all_layers), gpu.free_bytes, key=needs.__getitem__)
        return beside.layouts[count] if count else None

    def _filled(self, cpu: Device, gpus: Sequence[Device], order: Sequence[Device]) -> Counts:
        """Layers per GPU when each, the fastest first, takes all it can hold beside what those before it took."""
        layouts = self._together[_ids(cpu, gpus)]
        counts = [0] * len(gpus)
        left = self.all_layers
        for gpu in order:
            at = gpus.index(gpu)
            low, high = 0, left + 1  # low layers fit, high ones do not
            middle = left  # all that are left, the usual answer, is tried first
            while low < middle:
                counts[at] = middle
                if _gpus_hold(layouts[tuple(counts)], gpus):
                    low = middle
                else:
                    high = middle
                middle = (low + high) // 2
            counts[at] = low
            left -= low
        return tuple(counts)

    def _beside(self, ids: tuple[str, str]) -> _Beside:
        return _Beside(self._layout, *ids, self.all_layers)

    def _among(self, ids: tuple[str, ...]) -> dict[Counts, Layout]:
        """Layouts over a CPU and several GPUs, by the layers on each GPU; those that hold none have no share."""

        def layout(counts: Counts) -> Layout:
            held = [(gpu_id, count) for gpu_id, count in zip(ids[1:], counts, strict=True) if count]
            return self._layout(((ids[0], self.all_layers - sum(counts)), *held))

        return _Computed(layout, MAX_KNOWN)

    def _layout(self, split: Split) -> Layout:
        kinds = (DeviceKind.CPU, *[DeviceKind.GPU] * (len(split) - 1))
        shares = device_shares(
            self._shape,
            [(device_id, kind, count) for (device_id, count), kind in zip(split, kinds, strict=True)],
            context_per_slot=self._load.context_per_slot,
            parallel=self._load.parallel,
            kv_type=self._load.kv_type,
            ubatch=self._load.ubatch,
            correction=self._corrections.of(split),
        )
        return Layout(
            shares=shares,
            needed_bytes={share.device_id: share.total_bytes for share in shares},
            read_bytes={share.device_id: bytes_read_per_token(self._shape, share) for share in shares},
            total_bytes=sum(share.total_bytes for share in shares),
        )


def _ids(cpu: Device, gpus: Sequence[Device]) -> tuple[str, ...]:
    return (cpu.device_id, *[gpu.device_id for gpu in gpus])


def _gpus_hold(layout: Layout, gpus: Sequence[Device]) -> bool:
    needed = layout.needed_bytes
    return not [gpu for gpu in gpus if needed.get(gpu.device_id, 0) > gpu.free_bytes]


def _usable_gpus(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices[1:] if device.usable]


def _fastest_first(gpus: Sequence[Device], cpu: Device) -> Sequence[Device]:
    return gpus if len(gpus) == 1 else sorted(gpus, key=lambda gpu: (-bandwidth(gpu, cpu), gpu.device_id))
