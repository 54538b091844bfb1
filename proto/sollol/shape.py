"""What the memory model needs to know of a model, from its GGUF headers alone.

Generic over architectures: metadata keys begin with the architecture's name and mean the same in all. What the engine
decides by architecture (which layers slide, which are recurrent) is in the tables here, read from its source.
"""

import re
from collections.abc import Iterable, Sequence

from sollol.architectures import (
    BOTH_IN_EVERY_LAYER,
    DEFAULT_WINDOWS,
    FULL_ATTENTION_INTERVALS,
    IGNORED_WINDOWS,
    KV_LAYERS_FROM_START,
    LIGHTNING_ATTENTION,
    RECURRENT,
    REPACKED,
    SLIDING_PERIODS,
    SLIDING_PERIODS_DENSE_FIRST,
)
from sollol.errors import Reason, refuse
from sollol.gguf import Header, TensorInfo
from sollol.gguf_figures import Metadata
from sollol.gguf_tables import TENSOR_TYPES
from sollol.names import quoted
from sollol.report import ModelShape

MOST_LAYERS = 512  # the engine's own limit
MOST_EXPERTS = 1024  # twice the engine's own limit; what one token uses of them is a loop's length in `compute`
WIDEST = 1 << 20  # of one layer: the widest models today have 1 << 16; more would overflow every sum made of it
F32 = 4

NOT_LANGUAGE_MODELS = frozenset({"clip", "wavtokenizer-dec"})
ADDITIONS = frozenset({"adapter", "mmproj"})

_LAYER = re.compile(r"(?:(?:enc|dec)\.)?blk\.(\d{1,9})\.", re.ASCII)
_EXPERTS = re.compile(r"\.ffn_\w+_exps\.")
_STAYS_ON_HOST = re.compile(r"(token_embd|per_layer_token_embd|position_embd|token_types)\b")


def shape_of(headers: Sequence[Header]) -> ModelShape:
    """The shape of a model from the headers of all its parts, the first one first.

    Raises:
        SollolError: MODEL_CORRUPT when figures are missing, absurd or contradict the tensors; MODEL_UNSUPPORTED for
            files that are no language model.
    """
    metadata = Metadata(headers[0])
    if is_addition(headers[0]):
        raise refuse(Reason.MODEL_UNSUPPORTED, f"{quoted(headers[0].name)} is no language model but an addition to one")
    layers = metadata.figure("block_count")
    if not 1 <= layers <= MOST_LAYERS:
        raise metadata.corrupt(f"it claims {layers} layers, must be 1 to {MOST_LAYERS}")
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    layer_bytes, expert_bytes, largest_bytes = _bytes_per_layer(metadata, tensors, layers)
    embedding, output = _bytes_outside_layers(tensors)
    window, sliding = _sliding(metadata, layers)
    recurrent = _recurrent_layers(metadata, layers)
    experts = _experts(metadata)
    heads = metadata.figure("attention.head_count")
    key_length, value_length = _head_lengths(metadata, heads)
    shape = ModelShape(
        architecture=metadata.architecture,
        layers=layers,
        embedding_length=metadata.figure("embedding_length"),
        feed_forward_length=_feed_forward_length(metadata),
        heads=heads,
        kv_heads=_kv_heads(metadata, layers, recurrent),
        key_length=key_length,
        value_length=value_length,
        vocabulary=metadata.length("tokenizer.ggml.tokens") or metadata.figure("vocab_size"),
        context_length=metadata.figure("context_length"),
        layer_bytes=layer_bytes,
        largest_tensor_bytes=largest_bytes,
        embedding_bytes=embedding,
        output_bytes=output,
        sliding_window=window,
        sliding_layers=sliding,
        experts=experts,
        experts_used=min(metadata.figure("expert_used_count"), experts),
        expert_bytes=expert_bytes if experts else (),
        recurrent_bytes=_recurrent_bytes(metadata, recurrent),
        tied_bytes=_tied_bytes(tensor for tensor in tensors if TENSOR_TYPES[tensor.type][0] not in REPACKED),
        expert_feed_forward_length=_expert_feed_forward_length(metadata),
        inner_length=metadata.figure("ssm.inner_size"),
        state_length=metadata.figure("ssm.state_size"),
        group_count=metadata.figure("ssm.group_count"),
        step_rank=metadata.figure("ssm.time_step_rank", metadata.figure("attention.decay_lora_rank")),
        indexer_length=metadata.figure("attention.indexer.key_length"),
    )
    _check_widths(metadata, shape)
    return shape


def _experts(metadata: Metadata) -> int:
    for name in ("expert_count", "expert_used_count"):
        if (claimed := metadata.figure(name)) > MOST_EXPERTS:
            raise metadata.corrupt(f"{name} is {claimed}, must be at most {MOST_EXPERTS}")
    return metadata.figure("expert_count")


def is_addition(header: Header) -> bool:
    """Whether the file belongs to a language model without being one: a projector for images, a LoRA."""
    return (
        header.metadata.get("general.architecture") in NOT_LANGUAGE_MODELS
        or header.metadata.get("general.type") in ADDITIONS
    )


def _check_widths(metadata: Metadata, shape: ModelShape) -> None:
    longest = max(shape.key_length, shape.value_length)
    widths = {
        "embedding": shape.embedding_length,
        "feed-forward": shape.feed_forward_length,
        "attention": max(shape.heads, *shape.kv_heads) * longest,
        "vocabulary": shape.vocabulary // 16,
        "indexer": shape.indexer_length,
        "recurrent state": max(shape.recurrent_bytes, default=0) // 1024,
    }
    for name, width in widths.items():
        if width > WIDEST:
            raise metadata.corrupt(f"its {name} of {width} is absurd")
    if not shape.embedding_length:
        raise metadata.corrupt("it claims no embedding length")


def _bytes_per_layer(
    metadata: Metadata, tensors: Iterable[TensorInfo], layers: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Bytes of all tensors, of the experts' alone, and of the largest tensor, by layer."""
    everything, experts, largest = [0] * layers, [0] * layers, [0] * layers
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        if found is None:
            continue
        layer = int(found[1])
        if layer >= layers:
            raise metadata.corrupt(f"tensor {quoted(tensor.name)} is beyond its {layers} layers")
        everything[layer] += tensor.size_bytes
        largest[layer] = max(largest[layer], tensor.size_bytes)
        if _EXPERTS.search(tensor.name):
            experts[layer] += tensor.size_bytes
    needed = everything[: max(1, layers - metadata.figure("nextn_predict_layers"))]  # drafting layers may be left out
    if not all(needed):
        raise metadata.corrupt(f"layer {everything.index(0)} of {layers} has no weights")
    return tuple(everything), tuple(experts), tuple(largest)


def _bytes_outside_layers(tensors: Iterable[TensorInfo]) -> tuple[int, int]:
    """Bytes that stay in the host's memory (embeddings), and bytes beside the last layer (output head, norms)."""
    outside = {tensor.name: tensor.size_bytes for tensor in tensors if not _LAYER.match(tensor.name)}
    host = sum(size for name, size in outside.items() if _STAYS_ON_HOST.match(name))
    output = sum(outside.values()) - host
    return host, output + _tied_bytes(tensors)


def _tied_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Without an output head the engine uses the token embeddings: a copy of them, where they are not themselves."""
    sizes = {tensor.name: tensor.size_bytes for tensor in tensors if not _LAYER.match(tensor.name)}
    return 0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0)


def _feed_forward_length(metadata: Metadata) -> int:
    """The widest that one token gets in a layer: with experts, all the chosen ones together."""
    dense = metadata.figure("feed_forward_length")
    return max(dense, metadata.figure("expert_used_count") * _expert_feed_forward_length(metadata))


def _expert_feed_forward_length(metadata: Metadata) -> int:
    if not metadata.figure("expert_count"):
        return 0
    return metadata.figure("expert_feed_forward_length", metadata.figure("feed_forward_length"))


def _head_lengths(metadata: Metadata, heads: int) -> tuple[int, int]:
    """Of a head's keys and values."""
    usual = metadata.figure("embedding_length") // heads if heads else 0
    is_mla = metadata.has("attention.key_length_mla")  # the engine then keeps compressed keys only
    return (
        _longest(metadata, "attention.key_length", usual),
        0 if is_mla else _longest(metadata, "attention.value_length", usual),
    )


def _longest(metadata: Metadata, name: str, head_size: int) -> int:
    """A head's length. Where sliding layers have another one, the longer of the two stands for both."""
    return max(metadata.figure(name, head_size), metadata.figure(f"{name}_swa"))


def _kv_heads(metadata: Metadata, layers: int, recurrent: Sequence[bool]) -> tuple[int, ...]:
    heads = metadata.per_layer("attention.head_count", layers, 0)
    kv_heads = metadata.per_layer("attention.head_count_kv", layers, 0)
    if not metadata.has("attention.head_count_kv"):
        kv_heads = heads
    shared = metadata.figure("attention.shared_kv_layers")
    cached = min(KV_LAYERS_FROM_START.get(metadata.architecture, layers), layers - min(shared, layers))
    attends_everywhere = metadata.architecture in BOTH_IN_EVERY_LAYER
    return tuple(
        count if layer < cached and (attends_everywhere or not recurrent[layer]) else 0
        for layer, count in enumerate(kv_heads)
    )


def _sliding(metadata: Metadata, layers: int) -> tuple[int, tuple[bool, ...]]:
    architecture = metadata.architecture
    window = metadata.figure("attention.sliding_window", DEFAULT_WINDOWS.get(architecture, 0))
    if architecture in IGNORED_WINDOWS or not window:
        return 0, ()
    pattern = metadata.flags("attention.sliding_window_pattern", layers)
    if pattern is None:
        dense_first = SLIDING_PERIODS_DENSE_FIRST.get(architecture)
        period = dense_first or SLIDING_PERIODS.get(architecture)
        if period is None:
            return 0, ()  # unknown here: counted as if every layer kept everything
        period = metadata.figure("attention.sliding_window_pattern", period)
        dense_at = 0 if dense_first else period - 1
        pattern = tuple(not period or layer % period != dense_at for layer in range(layers))
    return window, pattern


def _recurrent_layers(metadata: Metadata, layers: int) -> tuple[bool, ...]:
    """Which layers keep a state of fixed size in place of, or beside, keys and values."""
    if metadata.architecture in RECURRENT | BOTH_IN_EVERY_LAYER:
        return (True,) * layers
    listed = metadata.flags("attention.recurrent_layers", layers)
    if listed is not None:
        return listed
    interval = FULL_ATTENTION_INTERVALS.get(metadata.architecture)
    if interval is not None:
        interval = metadata.figure("full_attention_interval", interval) or 1
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not _state_elements(metadata):
        return (False,) * layers
    feed_forward = metadata.per_layer("feed_forward_length", layers, 0)
    kv_heads = metadata.per_layer("attention.head_count_kv", layers, 0)
    pure_feed_forward = metadata.architecture.startswith("nemotron_h")
    return tuple(
        not heads and not (pure_feed_forward and width) for heads, width in zip(kv_heads, feed_forward, strict=True)
    )


def _state_elements(metadata: Metadata) -> int:
    """Elements that a recurrent layer keeps per sequence: its convolution's inputs and its state."""
    embedding = metadata.figure("embedding_length")
    if wkv := metadata.figure("wkv.head_size"):
        return embedding * (metadata.figure("token_shift_count", 2) + wkv)
    if kernel := metadata.figure("shortconv.l_cache"):
        return embedding * (kernel - 1)
    kernel = max(metadata.figure("ssm.conv_kernel") - 1, 0)
    if head := metadata.figure("kda.head_dim"):
        heads = metadata.figure("attention.head_count")
        return heads * head * (3 * (kernel or 3) + head)
    if metadata.architecture in LIGHTNING_ATTENTION:
        return metadata.figure("attention.head_count") * metadata.figure("attention.key_length") ** 2
    inner, state = metadata.figure("ssm.inner_size"), metadata.figure("ssm.state_size")
    return kernel * (inner + 2 * metadata.figure("ssm.group_count") * state) + state * inner


def _recurrent_bytes(metadata: Metadata, recurrent: Sequence[bool]) -> tuple[int, ...]:
    if not any(recurrent):
        return ()
    size = F32 * _state_elements(metadata)
    return tuple(size if is_recurrent else 0 for is_recurrent in recurrent)
