"""What any range of a model's layers needs on a device of a plan over several nodes, and reads for each token.

The memory model says it for whole plans. A search asks for thousands of ranges: sums of layers, and what the memory
model said of ranges of the same kind, answer those. The plan that is chosen is computed by the memory model again.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from msgspec import Struct
from msgspec.structs import replace
from sollol.correction import Correction, scaled
from sollol.memory import (
    CPU_MARGIN_BYTES,
    GPU_MARGIN_BYTES,
    bytes_read_per_token,
    device_shares,
    kv_bytes,
    largest_tensor_bytes,
)
from sollol.report import DeviceKind, DeviceShare, ModelShape

from sollold.placement.corrections import NOTHING_KNOWN, Corrections
from sollold.placement.load import Load

F32 = 4
MANY = 3  # layers in a row from which on one more changes nothing in a compute buffer
_HOST = ("", DeviceKind.CPU, 0)


class Holding(Struct, frozen=True, kw_only=True):
    """`layers` whole layers on one device; `lent` unless the coordinator's own process uses the device."""

    node_id: str
    device_id: str
    kind: DeviceKind
    layers: int
    lent: bool


@lru_cache(maxsize=32)
def needs_for(shape: ModelShape, load: Load, corrections: Corrections = NOTHING_KNOWN) -> "Needs":
    """Kept from one decision to the next: what a model needs changes only with what is learned of it."""
    return Needs(shape, load.within(shape), corrections)


class Needs:
    """Layers are numbered from 0; number `shape.layers` is the output layer.

    Ranges are corrected as in a layout that was never loaded: no less than one that was gets at the end.
    """

    def __init__(self, shape: ModelShape, load: Load, corrections: Corrections) -> None:
        self.shape = shape
        self.every = shape.layers + 1
        self.context_per_slot = load.context_per_slot
        self._load, self._corrections = load, corrections
        self._usual = usual = corrections.usual
        weights = [scaled(size, usual.weights) for size in (*shape.layer_bytes, shape.output_bytes)]
        self._weights, self._output_bytes = _sums(weights), weights[-1]
        kv = [*map(self._kv, range(shape.layers)), 0]
        held = [weight + cache for weight, cache in zip(weights, kv, strict=True)]
        self._held = _sums(held)
        read = [bytes_read_per_token(shape, _one(layer, shape)) for layer in range(self.every)]
        self.read = _sums(read)
        # Every byte read needs at least so many bytes of a device.
        self.least_held = min(
            (size / once for size, once in zip(held[:-1], read[:-1], strict=True) if once), default=1.0
        )
        self.even = len(set(held[:-1])) == 1
        self._kinds = _kinds(shape)
        self._beside: dict[tuple[int, int], tuple[int, int]] = {}
        self._compute: dict[tuple[int, int, bool, bool, int], int] = {}
        self.coordinator_bytes = self._shares([_HOST, _gpu(1), _gpu(shape.layers)])[0].total_bytes
        alone = self._shares([_HOST, _gpu(self.every)])
        self.coordinator_bytes_alone, self._alone = alone[0].total_bytes, alone[1].compute_bytes
        samples = {kind: at for at, kind in enumerate(self._kinds)}.values()
        self._least_between = min(self._compute_bytes(at, at + 1) for at in samples)
        self._least_last = min(self._compute_bytes(self.every - count, self.every) for count in (1, 2))
        self._largest = [scaled(largest_tensor_bytes(shape, at), usual.weights) for at in range(shape.layers)]
        self._least_arriving = min(self._largest)
        # What a lent GPU takes of its node's RAM: the process, and the tensor on its way to the GPU.
        self.host_bytes = CPU_MARGIN_BYTES + max(weights[-1], *self._largest)
        self.crossing_bytes = F32 * shape.embedding_length
        self.answer_bytes = F32 * shape.vocabulary

    def first_that_fits(self, stop: int, free: int, kind: DeviceKind) -> int:
        """The smallest `first` for which the layers from `first` to `stop` fit into `free` bytes, beside others."""
        last = stop == self.every
        room = free - self._margin(kind)
        compute = self._least_last if last else self._least_between
        first = bisect_left(self._held, self._held[stop] - room + compute, 0, stop)
        if kind is DeviceKind.CPU:
            arriving = self._output_bytes if last else self._least_arriving
            first = max(first, bisect_left(self._weights, self._weights[stop] - room + arriving, 0, stop))
        while first < stop and self.range_bytes(first, stop, kind) > free:
            first += 1
        return first

    def range_bytes(self, first: int, stop: int, kind: DeviceKind) -> int:
        compute, arriving = self._beside.get((first, stop)) or self._looked_at(first, stop)
        taken = self._held[stop] - self._held[first] + compute
        if kind is DeviceKind.CPU:
            # A backend receives each tensor into memory of its own, before there are KV cache and compute buffer.
            taken = max(taken, self._weights[stop] - self._weights[first] + arriving)
        return taken + self._margin(kind)

    def alone_bytes(self, kind: DeviceKind) -> int:
        """What one device needs that holds every layer."""
        held = self._held[-1] + self._alone
        if kind is DeviceKind.CPU:
            held = max(held, self._weights[-1] + self._arriving_bytes(0, self.every))
        return held + self._margin(kind)

    def beside_bytes(self, kind: DeviceKind) -> int:
        """What a lent device's backend takes of its node's RAM, once for all of the node; a CPU's share has it."""
        return self.host_bytes if kind is DeviceKind.GPU else 0

    def fixed_bytes(self, kind: DeviceKind) -> int:
        """The least that a device needs before its first layer."""
        return min(self._least_between, self._least_last) + self._margin(kind)

    def shares(self, coordinator_cpu: str, holdings: Sequence[Holding]) -> tuple[DeviceShare, ...]:
        """The coordinator's CPU without layers, then each holding, by the memory model."""
        split = [(coordinator_cpu, DeviceKind.CPU, 0)]
        split.extend((holding.device_id, holding.kind, holding.layers) for holding in holdings)
        known = self._corrections.of((device_id, layers) for device_id, _, layers in split)
        host, *held = self._shares(split, known)
        named = (
            replace(share, node_id=holding.node_id, host_bytes=self.beside_bytes(holding.kind))
            if holding.lent
            else share
            for share, holding in zip(held, holdings, strict=True)
        )
        return (host, *named)

    def _looked_at(self, first: int, stop: int) -> tuple[int, int]:
        found = self._beside[first, stop] = (self._compute_bytes(first, stop), self._arriving_bytes(first, stop))
        return found

    def _arriving_bytes(self, first: int, stop: int) -> int:
        output = self._output_bytes if stop == self.every else 0
        return max(output, *self._largest[first:stop], 0)

    def _compute_bytes(self, first: int, stop: int) -> int:
        """A buffer's size follows from the kinds of layers there are, hardly from how many: a few ranges say it."""
        kinds = 0
        for kind in self._kinds[first:stop]:
            kinds |= kind
        count = min(stop - first, MANY)
        key = (kinds, count, stop >= self.shape.layers, stop == self.every, self._kinds[first - 1] if first else 0)
        compute = self._compute.get(key)
        if compute is None:
            share = self._shares([_HOST, _gpu(first), _gpu(stop - first), _gpu(self.every - stop)])[2]
            compute = self._compute[key] = share.compute_bytes
        return compute

    def _margin(self, kind: DeviceKind) -> int:
        return self._usual.added_bytes + (CPU_MARGIN_BYTES if kind is DeviceKind.CPU else GPU_MARGIN_BYTES)

    def _shares(
        self, split: list[tuple[str, DeviceKind, int]], correction: Correction | None = None
    ) -> tuple[DeviceShare, ...]:
        load = self._load
        return device_shares(
            self.shape,
            split,
            context_per_slot=self.context_per_slot,
            parallel=load.parallel,
            kv_type=load.kv_type,
            ubatch=load.ubatch,
            correction=correction or self._usual,
        )

    def _kv(self, layer: int) -> int:
        load = self._load
        size = kv_bytes(
            self.shape,
            layer,
            context_per_slot=self.context_per_slot,
            parallel=load.parallel,
            kv_type=load.kv_type,
            ubatch=load.ubatch,
        )
        return scaled(size, self._usual.kv)


def _kinds(shape: ModelShape) -> list[int]:
    """A bit for each kind of layer, by what its intermediate results depend on."""
    bits: dict[tuple[int, bool, bool, bool], int] = {}
    kinds = []
    for at in range(shape.layers):
        kind = (
            shape.kv_heads[at],
            bool(shape.sliding_window and shape.sliding_layers[at]),
            bool(shape.recurrent_bytes and shape.recurrent_bytes[at]),
            bool(shape.expert_bytes and shape.expert_bytes[at]),
        )
        kinds.append(bits.setdefault(kind, 1 << len(bits)))
    return kinds


def _gpu(layers: int) -> tuple[str, DeviceKind, int]:
    return ("", DeviceKind.GPU, layers)


def _sums(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)]


def _one(layer: int, shape: ModelShape) -> DeviceShare:
    if layer == shape.layers:
        return DeviceShare(device_id="", layers=1)
    return DeviceShare(device_id="", layers=1, first_layer=layer, last_layer=layer)
