"""Tensors and metadata of small models, by architecture: what llama.cpp's loader asks for (src/models)."""

from collections.abc import Callable, Iterator
from typing import Any

import gguf
from msgspec import Struct

Quantization = gguf.GGMLQuantizationType
Tensors = Iterator[tuple[str, tuple[int, ...]]]
Metadata = dict[str, Any]


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
    quantization: Quantization = gguf.GGMLQuantizationType.F16


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


def with_heads(sizes: Sizes, **more: Any) -> Metadata:
    lengths = {"attention.key_length": sizes.head, "attention.value_length": sizes.head}
    return _sizes(sizes, **more) | lengths | {"rope.dimension_count": sizes.head}


def with_experts(sizes: Sizes, **more: Any) -> Metadata:
    experts = {"expert_count": sizes.experts, "expert_used_count": sizes.experts_used}
    return with_heads(sizes, **more) | experts


def _recurrent(sizes: Sizes, **more: Any) -> Metadata:
    inner = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * sizes.embedding}
    return _sizes(sizes, feed_forward_length=0, attention__head_count=0, **more) | inner


def model_tensors(
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


def llama_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield from _feed_forward(sizes)


def qwen2_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, biases=True)
    yield from _feed_forward(sizes)


def qwen3_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield from _feed_forward(sizes)


def gemma2_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield "post_attention_norm.weight", (sizes.embedding,)
    yield from _feed_forward(sizes)
    yield "post_ffw_norm.weight", (sizes.embedding,)


def gemma3_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield "post_attention_norm.weight", (sizes.embedding,)
    yield from _feed_forward(sizes)
    yield "post_ffw_norm.weight", (sizes.embedding,)


def mixtral_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes)
    yield from _experts(sizes)


def qwen3moe_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, head_norms=True)
    yield from _experts(sizes)


def gpt_oss_layer(sizes: Sizes, _: int) -> Tensors:
    yield from _attention(sizes, biases=True)
    yield "attn_output.bias", (sizes.embedding,)
    yield "attn_sinks.weight", (sizes.heads,)
    yield from _experts(sizes, norm="post_attention_norm")
    yield "ffn_gate_inp.bias", (sizes.experts,)
    yield "ffn_gate_exps.bias", (sizes.expert_feed_forward, sizes.experts)
    yield "ffn_up_exps.bias", (sizes.expert_feed_forward, sizes.experts)
    yield "ffn_down_exps.bias", (sizes.embedding, sizes.experts)


def phi3_layer(sizes: Sizes, _: int) -> Tensors:
    queries, keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    yield "attn_norm.weight", (sizes.embedding,)
    yield "attn_qkv.weight", (sizes.embedding, queries + 2 * keys)
    yield "attn_output.weight", (queries, sizes.embedding)
    yield "ffn_norm.weight", (sizes.embedding,)
    yield "ffn_up.weight", (sizes.embedding, 2 * sizes.feed_forward)
    yield "ffn_down.weight", (sizes.feed_forward, sizes.embedding)


def mamba_layer(sizes: Sizes, _: int) -> Tensors:
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


def mamba2_layer(sizes: Sizes, _: int) -> Tensors:
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
        yield "token_embd_norm.weight", (wide,)  # moved out of the layer by `rwkv7_model`
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


def rwkv7_model(sizes: Sizes) -> Tensors:
    for name, shape in model_tensors(sizes, _rwkv7_layer, biases=True):
        yield name.removeprefix("blk.0.") if "token_embd_norm" in name else name, shape


def mamba_metadata(sizes: Sizes) -> Metadata:
    return _recurrent(sizes) | {"ssm.state_size": 16, "ssm.time_step_rank": sizes.embedding // 16}


def mamba2_metadata(sizes: Sizes) -> Metadata:
    heads = 2 * sizes.embedding // 64
    return _recurrent(sizes) | {"ssm.state_size": 128, "ssm.time_step_rank": heads, "ssm.group_count": 1}


def rwkv7_metadata(sizes: Sizes) -> Metadata:
    ranks = {"decay": 64, "iclr": 64, "value_residual_mix": 32, "gate": 128}
    return (
        _sizes(sizes, attention__head_count=0, attention__layer_norm_epsilon=1e-5)
        | {"wkv.head_size": 64}
        | {f"attention.{name}_lora_rank": rank for name, rank in ranks.items()}
    )
