"""How many bytes a model needs on each device: one pure model that heads choose by and agents admit by.

The formulas are those of llama.cpp's own allocations, with flash attention (its default). docs/memory-model.md compares
them with the sizes that the engine logs, for models of a dozen architectures; what no machine here could measure (GPUs,
other recurrences) is named there.
"""

from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct

from sollol.compute.device import Part, compute_bytes
from sollol.compute.scene import Batch
from sollol.correction import UNCORRECTED, Correction, scaled
from sollol.errors import Reason, refuse
from sollol.report import DeviceKind, DeviceShare, ModelShape

# Bytes and elements of one block, by the name that the engine knows the type by.
KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}
CELLS = 256  # the engine rounds the KV cells of a slot up to this
F32 = 4
# With two or more GPUs and nothing left on the CPU the engine overlaps batches, and keeps this many copies of the
# tensors that cross from one device to the next.
PIPELINE_COPIES = 4
# The process itself: 14 MiB of program and libraries, the vocabulary (about 50 MiB at 128 000 tokens), HTTP threads
# and their buffers, the allocator's slack.
CPU_MARGIN_BYTES = 128 * 1024**2
# A driver's context, kernels and cuBLAS workspace: 300 to 500 MiB that no buffer size in the log accounts for.
GPU_MARGIN_BYTES = 512 * 1024**2


class _Load(Struct, frozen=True):
    """What a coordinator shall hold at the same time, and what is known of the error of these figures."""

    context: int
    parallel: int
    kv_type: str
    ubatch: int
    correction: Correction = UNCORRECTED


class _Place(Struct, frozen=True):
    """Where layers are, `first` to `stop`, of which the number `shape.layers` stands for the output layer.

    `host`: the coordinator's own memory. `overlapped`: see PIPELINE_COPIES. `on_host`: how many layers are there.
    """

    device_id: str
    kind: DeviceKind
    first: int
    stop: int
    host: bool
    overlapped: bool
    on_host: int


def device_shares(
    shape: ModelShape,
    layers_per_device: Sequence[tuple[str, DeviceKind, int]],
    *,
    context_per_slot: int,
    parallel: int,
    kv_type: str,
    ubatch: int,
    correction: Correction = UNCORRECTED,
) -> tuple[DeviceShare, ...]:
    """What each device holds when whole layers are dealt out in order, the output layer being the last one.

    `layers_per_device`: device id, kind, number of layers. The coordinator's own CPU comes first, even with no layers:
    the token embeddings and the buffer that answers are read from are always there. A CPU further on is one that a
    backend lends. `correction`: what earlier loads have shown of these figures.

    Raises:
        SollolError: INVALID_REQUEST for an unknown `kv_type` or figures below 1.
        ValueError: the split is not one of this model.
    """
    counts = [count for _, _, count in layers_per_device]
    if sum(counts) != shape.layers + 1 or min(counts) < 0:
        raise ValueError(f"{counts} is no split of {shape.layers} layers and the output layer")
    if layers_per_device[0][1] is not DeviceKind.CPU:
        raise ValueError(f"the coordinator's CPU comes first, not {layers_per_device[0][0]}")
    overlapped = counts[0] == 0 and len(counts) - counts.count(0) > 1
    load = _checked_load(context_per_slot, parallel, kv_type, ubatch, correction)
    return tuple(
        _share(shape, load, _Place(device_id, kind, end - count, end, at == 0, overlapped, counts[0]))
        for at, ((device_id, kind, count), end) in enumerate(zip(layers_per_device, accumulate(counts), strict=True))
    )


def bytes_read_per_token(shape: ModelShape, share: DeviceShare) -> int:
    """Weights that one token makes this device read: its layers, of experts only those used, and the output layer.

    Not the embeddings, of which a token reads one row.
    """
    if share.first_layer is None or share.last_layer is None:
        layers = range(0)
    else:
        layers = range(share.first_layer, share.last_layer + 1)
    read = sum(shape.layer_bytes[at] - _idle_expert_bytes(shape, at) for at in layers)
    return read + (shape.output_bytes if share.layers > len(layers) else 0)


def kv_bytes(shape: ModelShape, layer: int, *, context_per_slot: int, parallel: int, kv_type: str, ubatch: int) -> int:
    """What one layer remembers of `parallel` conversations of `context_per_slot` tokens each."""
    cells = _padded(context_per_slot)
    if shape.sliding_window and shape.sliding_layers[layer]:
        cells = _sliding_cells(shape, cells, ubatch)
    size, block = KV_TYPES[kv_type]
    heads = shape.kv_heads[layer]
    # One row holds the keys, another the values, of all heads; quantized rows are made of whole blocks. An indexer's
    # row has one head of keys.
    widths = (heads * shape.key_length, heads * shape.value_length, shape.indexer_length if heads else 0)
    row = sum(-(-width // block) * size for width in widths)
    recurrent = shape.recurrent_bytes[layer] if shape.recurrent_bytes else 0
    return parallel * (cells * row + recurrent)


def largest_tensor_bytes(shape: ModelShape, layer: int) -> int:
    """Of one layer; two thirds of it where a report does not say: experts' gate and up in one tensor, beside down."""
    return shape.largest_tensor_bytes[layer] if shape.largest_tensor_bytes else shape.layer_bytes[layer] * 2 // 3


def _checked_load(
    context: int, parallel: int, kv_type: str, ubatch: int, correction: Correction = UNCORRECTED
) -> _Load:
    if kv_type not in KV_TYPES:
        raise refuse(Reason.INVALID_REQUEST, f"kv_type {kv_type[:20]!a} is none of {', '.join(KV_TYPES)}")
    for name, figure in (("context_per_slot", context), ("parallel", parallel), ("ubatch", ubatch)):
        if figure < 1:
            raise refuse(Reason.INVALID_REQUEST, f"{name} is {figure}, must be at least 1")
    return _Load(context, parallel, kv_type, ubatch, correction)


def _share(shape: ModelShape, load: _Load, place: _Place) -> DeviceShare:
    count = place.stop - place.first
    if not count and not place.host:
        return DeviceShare(device_id=place.device_id, layers=0)
    correction = load.correction
    repeating = range(place.first, min(place.stop, shape.layers))
    weights = scaled(_weight_bytes(shape, place, repeating), correction.weights)
    kv = scaled(_kv_bytes(shape, load, repeating), correction.kv)
    compute = scaled(_compute_bytes(shape, load, place), correction.compute)
    margin = correction.added_bytes + (CPU_MARGIN_BYTES if place.kind is DeviceKind.CPU else GPU_MARGIN_BYTES)
    if place.kind is DeviceKind.CPU and not place.host:
        arriving = scaled(_arriving_bytes(shape, place, repeating), correction.weights)
        margin += max(0, arriving - kv - compute)
    return DeviceShare(
        device_id=place.device_id,
        layers=count,
        first_layer=repeating.start if repeating else None,
        last_layer=repeating.stop - 1 if repeating else None,
        weight_bytes=weights,
        kv_bytes=kv,
        compute_bytes=compute,
        margin_bytes=margin,
        total_bytes=weights + kv + compute + margin,
    )


def _weight_bytes(shape: ModelShape, place: _Place, repeating: range) -> int:
    weights = sum(shape.layer_bytes[at] for at in repeating)
    has_output = place.stop > place.first and place.stop > shape.layers
    if has_output:
        weights += shape.output_bytes
    if place.host:
        weights += shape.embedding_bytes
        if has_output:
            weights -= shape.tied_bytes  # one and the same tensor
    return weights


def _kv_bytes(shape: ModelShape, load: _Load, repeating: range) -> int:
    return sum(
        kv_bytes(
            shape,
            at,
            context_per_slot=load.context,
            parallel=load.parallel,
            kv_type=load.kv_type,
            ubatch=load.ubatch,
        )
        for at in repeating
    )


def _arriving_bytes(shape: ModelShape, place: _Place, repeating: range) -> int:
    """A backend receives each tensor in a buffer of its own, before there are KV cache and compute buffer."""
    output = shape.output_bytes if place.stop > shape.layers else 0
    return max(output, *(largest_tensor_bytes(shape, at) for at in repeating), 0)


def _compute_bytes(shape: ModelShape, load: _Load, place: _Place) -> int:
    """The buffer for one micro-batch, on the host also the one that answers are read from."""
    cells = _padded(load.context)
    tokens = min(cells * load.parallel, load.ubatch)
    batch = Batch(
        tokens=-(-tokens // load.parallel) * load.parallel,  # the same number from every sequence
        sequences=load.parallel,
        cells=cells,
        sliding_cells=_sliding_cells(shape, cells, load.ubatch),
        quantized_kv=KV_TYPES[load.kv_type][1] > 1,
        f32_kv=load.kv_type == "f32",
    )
    part = Part(
        first=place.first,
        stop=place.stop,
        on_cpu=place.host,
        after_cpu=place.first == place.on_host,
        all_offloaded=not place.on_host,
        copies=PIPELINE_COPIES if place.overlapped else 1,
    )
    compute = compute_bytes(shape, batch, part)
    if place.host:
        return compute + F32 * load.parallel * shape.vocabulary
    return compute + (_offload_bytes(shape, range(place.on_host)) if place.kind is DeviceKind.GPU else 0)


def _sliding_cells(shape: ModelShape, cells: int, ubatch: int) -> int:
    return min(cells, _padded(shape.sliding_window + ubatch)) if shape.sliding_window else cells


def _offload_bytes(shape: ModelShape, on_cpu: range) -> int:
    """GPUs help with long prompts for layers on the CPU, and copy one weight tensor at a time."""
    return max((largest_tensor_bytes(shape, at) for at in on_cpu if at < shape.layers), default=0)


def _idle_expert_bytes(shape: ModelShape, layer: int) -> int:
    if not shape.experts or not shape.expert_bytes:
        return 0
    return shape.expert_bytes[layer] * max(0, shape.experts - shape.experts_used) // shape.experts


def _padded(cells: int) -> int:
    return -(-cells // CELLS) * CELLS
