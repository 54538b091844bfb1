"""How many bytes a model needs on each device: one pure model that heads choose by and agents admit by.

The formulas are those of llama.cpp's own allocations with flash attention (its default), checked against the sizes that
it logs: weights and KV cache to the byte, compute buffers between 0 and 11 % too large, never too small. Sliding
windows, MLA, recurrent states and the terms for GPUs are read from its source and have not been measured.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct

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
MASK = 2  # the attention mask is f16
# With two or more GPUs and nothing left on the CPU the engine overlaps batches, and keeps this many copies of the
# tensors that cross from one device to the next.
PIPELINE_COPIES = 4
# The process itself: 14 MiB of program and libraries, the vocabulary (about 50 MiB at 128 000 tokens), HTTP threads
# and their buffers, the allocator's slack.
CPU_MARGIN_BYTES = 128 * 1024**2
# A driver's context, kernels and cuBLAS workspace: 300 to 500 MiB that no buffer size in the log accounts for.
GPU_MARGIN_BYTES = 512 * 1024**2


class _Load(Struct, frozen=True):
    """What a coordinator shall hold at the same time, and how it is split."""

    context: int
    parallel: int
    kv_type: str
    ubatch: int
    copies: int = 1
    offload_bytes: int = 0


def device_shares(
    shape: ModelShape,
    layers_per_device: Sequence[tuple[str, DeviceKind, int]],
    *,
    context_per_slot: int,
    parallel: int,
    kv_type: str,
    ubatch: int,
) -> tuple[DeviceShare, ...]:
    """What each device holds when whole layers are dealt out in order, the output layer being the last one.

    `layers_per_device`: device id, kind, number of layers. The CPU comes first, even with no layers: the token
    embeddings and the buffer that answers are read from are always there.

    Raises:
        SollolError: INVALID_REQUEST for an unknown `kv_type` or figures below 1.
        ValueError: the split is not one of this model.
    """
    counts = [count for _, _, count in layers_per_device]
    kinds = [kind for _, kind, _ in layers_per_device]
    if sum(counts) != shape.layers + 1 or min(counts) < 0:
        raise ValueError(f"{counts} is no split of {shape.layers} layers and the output layer")
    if kinds[0] is not DeviceKind.CPU or DeviceKind.CPU in kinds[1:]:
        raise ValueError(f"the CPU, and only one, comes first: {kinds}")
    overlapped = counts[0] == 0 and len(counts) - counts.count(0) > 1
    load = _checked_load(
        context_per_slot,
        parallel,
        kv_type,
        ubatch,
        copies=PIPELINE_COPIES if overlapped else 1,
        offload_bytes=_offload_bytes(shape, range(counts[0])),
    )
    return tuple(
        _share(shape, load, device_id, kind, range(end - count, end))
        for (device_id, kind, count), end in zip(layers_per_device, accumulate(counts), strict=True)
    )


def layers_that_fit(
    shape: ModelShape,
    free_bytes: int,
    kind: DeviceKind,
    *,
    with_output: bool,
    context_per_slot: int,
    parallel: int,
    kv_type: str,
    ubatch: int,
) -> int:
    """The most layers that one device with `free_bytes` can hold while the CPU or other devices hold the rest.

    The front ones, or `with_output` the last ones; the output layer then counts as one. 0 when not one fits.

    Raises:
        SollolError: as `device_shares`.
    """
    every = shape.layers + 1
    offload = _offload_bytes(shape, range(shape.layers)) if kind is DeviceKind.GPU else 0
    load = _checked_load(context_per_slot, parallel, kv_type, ubatch, offload_bytes=offload)

    def needed(count: int) -> int:
        layers = range(every - count, every) if with_output else range(count)
        return _share(shape, load, "", kind, layers).total_bytes

    return bisect_right(range(1, (every if with_output else shape.layers) + 1), free_bytes, key=needed)


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
        cells = min(cells, _padded(shape.sliding_window + ubatch))
    size, block = KV_TYPES[kv_type]
    heads = shape.kv_heads[layer]
    # One row holds the keys, another the values, of all heads; quantized rows are made of whole blocks.
    row = sum(-(-heads * length // block) * size for length in (shape.key_length, shape.value_length))
    recurrent = shape.recurrent_bytes[layer] if shape.recurrent_bytes else 0
    return parallel * (cells * row + recurrent)


def _checked_load(
    context: int, parallel: int, kv_type: str, ubatch: int, *, copies: int = 1, offload_bytes: int = 0
) -> _Load:
    if kv_type not in KV_TYPES:
        raise refuse(Reason.INVALID_REQUEST, f"kv_type {kv_type[:20]!a} is none of {', '.join(KV_TYPES)}")
    for name, figure in (("context_per_slot", context), ("parallel", parallel), ("ubatch", ubatch)):
        if figure < 1:
            raise refuse(Reason.INVALID_REQUEST, f"{name} is {figure}, must be at least 1")
    return _Load(context, parallel, kv_type, ubatch, copies, offload_bytes)


def _share(shape: ModelShape, load: _Load, device_id: str, kind: DeviceKind, layers: range) -> DeviceShare:
    """`layers`: those held; the number `shape.layers` stands for the output layer."""
    if kind is DeviceKind.GPU and not layers:
        return DeviceShare(device_id=device_id, layers=0)
    repeating = range(layers.start, min(layers.stop, shape.layers))
    has_output = layers.stop > shape.layers and len(layers) > 0
    weights = sum(shape.layer_bytes[at] for at in repeating) + (shape.output_bytes if has_output else 0)
    if kind is DeviceKind.CPU:
        weights += shape.embedding_bytes
    kv = sum(
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
    compute = _compute_bytes(shape, load, kind, holds_layers=bool(layers), has_output=has_output)
    margin = CPU_MARGIN_BYTES if kind is DeviceKind.CPU else GPU_MARGIN_BYTES
    return DeviceShare(
        device_id=device_id,
        layers=len(layers),
        first_layer=repeating.start if repeating else None,
        last_layer=repeating.stop - 1 if repeating else None,
        weight_bytes=weights,
        kv_bytes=kv,
        compute_bytes=compute,
        margin_bytes=margin,
        total_bytes=weights + kv + compute + margin,
    )


def _compute_bytes(shape: ModelShape, load: _Load, kind: DeviceKind, *, holds_layers: bool, has_output: bool) -> int:
    """Buffers for one micro-batch: the widest moment of a layer, the attention mask, copies, and what the kind adds."""
    embedding = max(shape.embedding_length, shape.heads * shape.key_length)
    logits = F32 * load.parallel * shape.vocabulary
    widest = F32 * load.ubatch * shape.embedding_length  # the embedded tokens
    if holds_layers:
        widest = F32 * load.ubatch * (4 * embedding + 3 * shape.feed_forward_length)
        if shape.experts_used:  # every chosen expert answers in full width before the answers are added up
            widest += F32 * load.ubatch * shape.experts_used * shape.embedding_length
    if has_output:
        widest = max(widest, logits)  # in memory that the layers are done with
    total = widest + load.copies * load.ubatch * MASK * _padded(load.context)
    if load.copies > 1:
        total += load.copies * load.ubatch * F32 * shape.embedding_length
    return total + (logits if kind is DeviceKind.CPU else load.offload_bytes)


def _offload_bytes(shape: ModelShape, on_cpu: range) -> int:
    """GPUs help with long prompts for layers on the CPU, and copy one weight tensor at a time: under half a layer."""
    return max((shape.layer_bytes[at] // 2 for at in on_cpu if at < shape.layers), default=0)


def _idle_expert_bytes(shape: ModelShape, layer: int) -> int:
    if not shape.experts or not shape.expert_bytes:
        return 0
    return shape.expert_bytes[layer] * max(0, shape.experts - shape.experts_used) // shape.experts


def _padded(cells: int) -> int:
    return -(-cells // CELLS) * CELLS
