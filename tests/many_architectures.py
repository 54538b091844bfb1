"""Makes small models of many architectures, for what the engine says of their memory. All weights are zero.

The files are sparse: 60 MB of weights take a few KB of disk and load like any other. What such a model says is nonsense.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from msgspec import Struct

from tests.tiny_model import BOS, CHAT_TEMPLATE, EOS, UNKNOWN, vocabulary

Quantization = gguf.GGMLQuantizationType
Tensors = Iterator[tuple[str, tuple[int, ...]]]
Metadata = dict[str, Any]

F16, F32, Q4_0, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "Q4_0", "Q8_0"))
ALIGNMENT = 32
# Norms, biases and what recurrences are sensitive to stay in f32, as converters write them.
PRECISE = (".bias", "norm.weight", "ssm_a", "ssm_d", "ssm_conv1d.weight", "ffn_gate_inp.weight", "lerp_fused.weight")


class Sizes(Struct, frozen=True, kw_only=True):
    """Small, but in the proportions of real models, so that the same moments need the most memory as in them."""

    layers: int = 6
    embedding: int = 512
    heads: int = 8
    kv_heads: int = 2
    head: int = 64
    feed_forward: int = 1536
    vocabulary: int = 8192
    experts: int = 8
    experts_used: int = 2
    expert_feed_forward: int = 768
    window: int = 512
    quantization: Quantization = F16


class Architecture(Struct, frozen=True, kw_only=True):
    """`tensors` yields names and shapes, the input's length first; `metadata` is without the architecture's prefix."""

    engine_name: str
    tensors: Callable[[Sizes], Tensors]
    metadata: Callable[[Sizes], Metadata]
    sizes: Sizes = Sizes()


def write_model(path: Path, architecture: Architecture, sizes: Sizes | None = None) -> None:
    sizes = sizes or architecture.sizes
    writer = gguf.GGUFWriter(path, architecture.engine_name)
    for key, content in architecture.metadata(sizes).items():
        _add(writer, f"{architecture.engine_name}.{key}", content)
    _add_vocabulary(writer, sizes.vocabulary)
    data_bytes = 0
    for name, shape in architecture.tensors(sizes):
        kind = F32 if len(shape) == 1 or name.endswith(PRECISE) else sizes.quantization
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        # The writer wants numpy's order; the data type only matters where it is uint8.
        writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), size, raw_dtype=kind)
        data_bytes += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        file.truncate(-(-end // ALIGNMENT) * ALIGNMENT + data_bytes)


def _add(writer: gguf.GGUFWriter, key: str, content: Any) -> None:
    if isinstance(content, list):
        writer.add_array(key, content)
    elif isinstance(content, bool):
        writer.add_bool(key, content)
    elif isinstance(content, float):
        writer.add_float32(key, content)
    else:
        writer.add_uint32(key, content)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    entries = vocabulary()
    entries += [(f"<unused_{at}>", gguf.TokenType.UNUSED) for at in range(len(entries), size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_scores([float(-index) for index in range(len(entries))])
    writer.add_token_types([kind for _, kind in entries])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_chat_template(CHAT_TEMPLATE)


def _sizes(sizes: Sizes, **more: Any) -> Metadata:
    return {
        "block_count": sizes.layers,
        "context_length": 32768,
        "embedding_length": sizes.embedding,
        "feed_forward_length": sizes.feed_forward,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": sizes.vocabulary,
    } | {key.replace("__", "."): content for key, content in more.items()}


def _with_heads(sizes: Sizes, **more: Any) -> Metadata:
    lengths = {"attention.key_length": sizes.head, "attention.value_length": sizes.head}
    return _sizes(sizes, **more) | lengths | {"rope.dimension_count": sizes.head}


def _with_experts(sizes: Sizes, **more: Any) -> Metadata:
    experts = {"expert_count": sizes.experts, "expert_used_count": sizes.experts_used}
    return _with_heads(sizes, **more) | experts


def _recurrent(sizes: Sizes, **more: Any) -> Metadata:
    inner = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * sizes.embedding}
    return _sizes(sizes, feed_forward_length=0, attention__head_count=0, **more) | inner


def _model(
    sizes: Sizes, layer: Callable[[Sizes, int], Tensors], *, tied: bool = False, biases: bool = False
) -> Tensors:
    """Embeddings, layers, output."""
    yield "token_embd.weight", (sizes.embedding, sizes.vocabulary)
    for at in range(sizes.layers):
        for name, shape in layer(sizes, at):
            yield f"blk.{at}.{name}", shape
    yield "output_norm.weight", (sizes.embedding,)
    if biases:
        yield "output_norm.bias", (sizes.embedding,)
    if not tied:
        yield "output.weight", (sizes.embedding, sizes.vocabulary)


def _attention(sizes: Sizes, *, biases: bool = False, head_norms: bool = False) -> Tensors:
    queries, keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    yield "attn_norm.weight", (sizes.embedding,)
    for name, width in (("q", queries), ("k", keys), ("v", keys)):
        yield f"attn_{name}.weight", (sizes.embedding, width)
        if biases:
            yield f"attn_{name}.bias", (width,)
    yield "attn_output.weight", (queries, sizes.embedding)
    if head_norms:
        yield "attn_q_norm.weight", (sizes.head,)
        yield "attn_k_norm.weight", (sizes.head,)


def _feed_forward(sizes: Sizes, *, norm: str = "ffn_norm") -> Tensors:
    yield f"{norm}.weight", (sizes.embedding,)
    yield "ffn_gate.weight", (sizes.embedding, sizes.feed_forward)
    yield "ffn_up.weight", (sizes.embedding, sizes.feed_forward)
    yield "ffn_down.weight", (sizes.feed_forward, sizes.embedding)


def _experts(sizes: Sizes, *, norm: str = "ffn_norm") -> Tensors:
    yield f"{norm}.weight", (sizes.embedding,)
    yield "ffn_gate_inp.weight", (sizes.embedding, sizes.experts)
    yield "ffn_gate_exps.weight", (sizes.embedding, sizes.expert_feed_forward, sizes.experts)
    yield "ffn_up_exps.weight", (sizes.embedding, sizes.expert_feed_forward, sizes.experts)
    yield "ffn_down_exps.weight", (sizes.expert_feed_forward, sizes.embedding, sizes.experts)


def _llama_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield from _feed_forward(sizes)


def _qwen2_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, biases=True)
    yield from _feed_forward(sizes)


def _qwen3_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield from _feed_forward(sizes)


def _gemma2_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield "post_attention_norm.weight", (sizes.embedding,)
    yield from _feed_forward(sizes)
    yield "post_ffw_norm.weight", (sizes.embedding,)


def _gemma3_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield "post_attention_norm.weight", (sizes.embedding,)
    yield from _feed_forward(sizes)
    yield "post_ffw_norm.weight", (sizes.embedding,)


def _mixtral_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield from _experts(sizes)


def _qwen3moe_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield from _experts(sizes)


def _gpt_oss_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, biases=True)
    yield "attn_output.bias", (sizes.embedding,)
    yield "attn_sinks.weight", (sizes.heads,)
    yield from _experts(sizes, norm="post_attention_norm")
    yield "ffn_gate_inp.bias", (sizes.experts,)
    yield "ffn_gate_exps.bias", (sizes.expert_feed_forward, sizes.experts)
    yield "ffn_up_exps.bias", (sizes.expert_feed_forward, sizes.experts)
    yield "ffn_down_exps.bias", (sizes.embedding, sizes.experts)


def _mamba_layer(sizes: Sizes, _: int) -> Tensors:
    inner, state, rank = 2 * sizes.embedding, 16, sizes.embedding // 16
    yield "attn_norm.weight", (sizes.embedding,)
    yield "ssm_in.weight", (sizes.embedding, 2 * inner)
    yield "ssm_conv1d.weight", (4, inner)
    yield "ssm_conv1d.bias", (inner,)
    yield "ssm_x.weight", (inner, rank + 2 * state)
    yield "ssm_dt.weight", (rank, inner)
    yield "ssm_dt.bias", (inner,)
    yield "ssm_a", (state, inner)
    yield "ssm_d", (inner,)
    yield "ssm_out.weight", (inner, sizes.embedding)


def _mamba2_layer(sizes: Sizes, _: int) -> Tensors:
    inner, state, heads = 2 * sizes.embedding, 128, 2 * sizes.embedding // 64
    yield "attn_norm.weight", (sizes.embedding,)
    yield "ssm_in.weight", (sizes.embedding, 2 * inner + 2 * state + heads)
    yield "ssm_conv1d.weight", (4, inner + 2 * state)
    yield "ssm_conv1d.bias", (inner + 2 * state,)
    yield "ssm_dt.bias", (heads,)
    yield "ssm_a", (1, heads)
    yield "ssm_d", (1, heads)
    yield "ssm_norm.weight", (inner, 1)
    yield "ssm_out.weight", (inner, sizes.embedding)


def _rwkv7_layer(sizes: Sizes, at: int) -> Tensors:
    wide = sizes.embedding
    if at == 0:
        yield "token_embd_norm.weight", (wide,)  # moved out of the layer by `_rwkv7_model`
        yield "token_embd_norm.bias", (wide,)
    for norm in ("attn_norm", "attn_norm_2", "time_mix_ln"):
        yield f"{norm}.weight", (wide,)
        yield f"{norm}.bias", (wide,)
    for name, rank in (("w", 64), ("a", 64), ("v", 64 if at == 0 else 32)):
        yield f"time_mix_{name}0.weight", (wide,)
        yield f"time_mix_{name}1.weight", (wide, rank)
        yield f"time_mix_{name}2.weight", (rank, wide)
    yield "time_mix_g1.weight", (wide, 128)
    yield "time_mix_g2.weight", (128, wide)
    yield "time_mix_lerp_fused.weight", (wide, 1, 1, 6)
    for name in ("k_k", "k_a", "r_k"):
        yield f"time_mix_{name}.weight", (wide,)
    for name in ("key", "value", "receptance", "output"):
        yield f"time_mix_{name}.weight", (wide, wide)
    yield "channel_mix_lerp_k.weight", (wide,)
    yield "channel_mix_key.weight", (wide, sizes.feed_forward)
    yield "channel_mix_value.weight", (sizes.feed_forward, wide)


def _rwkv7_model(sizes: Sizes) -> Tensors:
    for name, shape in _model(sizes, _rwkv7_layer, biases=True):
        yield name.removeprefix("blk.0.") if "token_embd_norm" in name else name, shape


def _mamba_metadata(sizes: Sizes) -> Metadata:
    return _recurrent(sizes) | {"ssm.state_size": 16, "ssm.time_step_rank": sizes.embedding // 16}


def _mamba2_metadata(sizes: Sizes) -> Metadata:
    heads = 2 * sizes.embedding // 64
    return _recurrent(sizes) | {"ssm.state_size": 128, "ssm.time_step_rank": heads, "ssm.group_count": 1}


def _rwkv7_metadata(sizes: Sizes) -> Metadata:
    ranks = {"decay": 64, "iclr": 64, "value_residual_mix": 32, "gate": 128}
    return (
        _sizes(sizes, attention__head_count=0, attention__layer_norm_epsilon=1e-5)
        | {"wkv.head_size": 64}
        | {f"attention.{name}_lora_rank": rank for name, rank in ranks.items()}
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(engine_name="llama", tensors=lambda s: _model(s, _llama_layer), metadata=_with_heads),
    "llama, tied": Architecture(
        engine_name="llama", tensors=lambda s: _model(s, _llama_layer, tied=True), metadata=_with_heads
    ),
    "qwen2": Architecture(
        engine_name="qwen2", tensors=lambda s: _model(s, _qwen2_layer, tied=True), metadata=_with_heads
    ),
    "qwen3": Architecture(
        engine_name="qwen3",
        tensors=lambda s: _model(s, _qwen3_layer, tied=True),
        metadata=_with_heads,
        sizes=Sizes(heads=16),  # its heads together are wider than its embedding
    ),
    "gemma2": Architecture(
        engine_name="gemma2",
        tensors=lambda s: _model(s, _gemma2_layer, tied=True),
        metadata=lambda s: _with_heads(
            s, attention__sliding_window=s.window, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
    ),
    "gemma3": Architecture(
        engine_name="gemma3",
        tensors=lambda s: _model(s, _gemma3_layer, tied=True),
        metadata=lambda s: _with_heads(s, attention__sliding_window=s.window),
    ),
    "gpt-oss": Architecture(
        engine_name="gpt-oss",
        tensors=lambda s: _model(s, _gpt_oss_layer),
        metadata=lambda s: _with_experts(
            s, attention__sliding_window=s.window, expert_feed_forward_length=s.expert_feed_forward
        ),
        sizes=Sizes(window=128, experts=16, experts_used=4, feed_forward=768),
    ),
    "mixtral": Architecture(
        engine_name="llama",
        tensors=lambda s: _model(s, _mixtral_layer),
        metadata=_with_experts,
        sizes=Sizes(feed_forward=768),
    ),
    "qwen3moe": Architecture(
        engine_name="qwen3moe",
        tensors=lambda s: _model(s, _qwen3moe_layer),
        metadata=lambda s: _with_experts(s, expert_feed_forward_length=s.expert_feed_forward),
        sizes=Sizes(experts=32, experts_used=8, expert_feed_forward=192, heads=16),
    ),
    "mamba": Architecture(engine_name="mamba", tensors=lambda s: _model(s, _mamba_layer), metadata=_mamba_metadata),
    "mamba2": Architecture(engine_name="mamba2", tensors=lambda s: _model(s, _mamba2_layer), metadata=_mamba2_metadata),
    "rwkv7": Architecture(engine_name="rwkv7", tensors=_rwkv7_model, metadata=_rwkv7_metadata),
}
