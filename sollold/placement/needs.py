"""What any range of a model's layers needs on a device of a plan over several nodes, and reads for each token.

The memory model says it for whole plans. A search asks for thousands of ranges, so their sums are kept here; the plan
that is chosen is computed by the memory model again.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from msgspec import Struct
from msgspec.structs import replace
from sollol.memory import CPU_MARGIN_BYTES, GPU_MARGIN_BYTES, bytes_read_per_token, device_shares, kv_bytes
from sollol.report import DeviceKind, DeviceShare, ModelShape

from sollold.placement.layout import Load

F32 = 4


class Holding(Struct, frozen=True, kw_only=True):
    """`layers` whole layers on one device; `lent` unless the coordinator's own process uses the device."""

    node_id: str
    device_id: str
    kind: DeviceKind
    layers: int
    lent: bool


@lru_cache(maxsize=32)
def needs_for(shape: ModelShape, load: Load) -> "Needs":
    """Kept from one decision to the next: what a model needs never changes."""
    return Needs(shape, load)


class Needs:
    """Layers are numbered from 0; number `shape.layers` is the output layer."""

    def __init__(self, shape: ModelShape, load: Load) -> None:
        self.shape = shape
        self.every = shape.layers + 1
        self.context_per_slot = min(load.context_per_slot, shape.context_length or load.context_per_slot)
        self._load = load
        weights = (*shape.layer_bytes, shape.output_bytes)
        kv = (*(self._kv(layer) for layer in range(shape.layers)), 0)
        self.weights = _sums(weights)
        self.held = _sums([weight + cache for weight, cache in zip(weights, kv, strict=True)])
        self.read = _sums([bytes_read_per_token(shape, _one(layer, shape)) for layer in range(self.every)])
        front, back = self._compute(1, shape.layers), self._compute(shape.layers, 1)
        self._between, self._last = front[1], back[2]
        self.coordinator_bytes = front[0]
        self.coordinator_bytes_alone, self._alone = self._compute(self.every)
        # A backend receives one tensor at a time into memory of its own. Half a layer bounds it: the memory model
        # assumes that too.
        self._message = max(shape.layer_bytes) // 2
        self._last_message = max(self._message, shape.output_bytes)
        # What a lent GPU takes of its node's RAM: the process, and what it receives.
        self.host_bytes = CPU_MARGIN_BYTES + self._received(last=True)
        self.crossing_bytes = F32 * shape.embedding_length
        self.answer_bytes = F32 * shape.vocabulary
        # Every byte read needs at least so many bytes of a device.
        read = [end - start for start, end in pairwise(self.read[:-1])]
        held = [end - start for start, end in pairwise(self.held[:-1])]
        self.least_held = min((size / once for size, once in zip(held, read, strict=True) if once), default=1.0)
        self.even = len(set(zip(weights[:-1], kv[:-1], strict=True))) == 1

    def first_that_fits(self, stop: int, free: int, kind: DeviceKind) -> int:
        """The smallest `first` for which the layers from `first` to `stop` fit into `free` bytes, beside others."""
        last = stop == self.every
        fixed = (self._last if last else self._between) + margin(kind)
        first = bisect_left(self.held, self.held[stop] - free + fixed, 0, stop)
        if kind is DeviceKind.CPU:
            fixed = self._received(last=last) + CPU_MARGIN_BYTES
            first = max(first, bisect_left(self.weights, self.weights[stop] - free + fixed, 0, stop))
        return first

    def range_bytes(self, first: int, stop: int, kind: DeviceKind) -> int:
        last = stop == self.every
        held = self.held[stop] - self.held[first] + (self._last if last else self._between)
        if kind is DeviceKind.CPU:
            held = max(held, self.weights[stop] - self.weights[first] + self._received(last=last))
        return held + margin(kind)

    def alone_bytes(self, kind: DeviceKind) -> int:
        """What one device needs that holds every layer."""
        held = self.held[-1] + self._alone
        if kind is DeviceKind.CPU:
            held = max(held, self.weights[-1] + self._received(last=True))
        return held + margin(kind)

    def fixed_bytes(self, kind: DeviceKind) -> int:
        """The least that a device needs before its first layer."""
        return min(self._between, self._last) + margin(kind)

    def shares(self, coordinator_cpu: str, holdings: Sequence[Holding]) -> tuple[DeviceShare, ...]:
        """The coordinator's CPU without layers, then each holding, by the memory model."""
        split = [(coordinator_cpu, DeviceKind.CPU, 0)]
        split.extend((holding.device_id, DeviceKind.GPU, holding.layers) for holding in holdings)
        host, *held = self._shares(split)
        return (host, *(self._adjusted(share, holding) for share, holding in zip(held, holdings, strict=True)))

    def _adjusted(self, share: DeviceShare, holding: Holding) -> DeviceShare:
        """A backend's CPU needs no driver, but the tensor being received before the KV cache takes its place."""
        taken = share.weight_bytes + share.kv_bytes + share.compute_bytes
        extra = margin(holding.kind)
        if holding.kind is DeviceKind.CPU:
            last = share.last_layer is None or share.layers > share.last_layer - (share.first_layer or 0) + 1
            extra += max(0, self._received(last=last) - share.kv_bytes - share.compute_bytes)
        node_id = holding.node_id if holding.lent else ""
        return replace(share, node_id=node_id, margin_bytes=extra, total_bytes=taken + extra)

    def _received(self, *, last: bool) -> int:
        return self._last_message if last else self._message

    def _compute(self, *counts: int) -> list[int]:
        """The coordinator's bytes, then the compute buffer of each of two devices."""
        split = [("", DeviceKind.CPU, 0), *(("", DeviceKind.GPU, count) for count in counts)]
        host, *held = self._shares(split)
        return [host.total_bytes, *(share.compute_bytes for share in held)]

    def _shares(self, split: list[tuple[str, DeviceKind, int]]) -> tuple[DeviceShare, ...]:
        load = self._load
        return device_shares(
            self.shape,
            split,
            context_per_slot=self.context_per_slot,
            parallel=load.parallel,
            kv_type=load.kv_type,
            ubatch=load.ubatch,
        )

    def _kv(self, layer: int) -> int:
        load = self._load
        return kv_bytes(
            self.shape,
            layer,
            context_per_slot=self.context_per_slot,
            parallel=load.parallel,
            kv_type=load.kv_type,
            ubatch=load.ubatch,
        )


def margin(kind: DeviceKind) -> int:
    return CPU_MARGIN_BYTES if kind is DeviceKind.CPU else GPU_MARGIN_BYTES


def _sums(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)]


def _one(layer: int, shape: ModelShape) -> DeviceShare:
    if layer == shape.layers:
        return DeviceShare(device_id="", layers=1)
    return DeviceShare(device_id="", layers=1, first_layer=layer, last_layer=layer)
