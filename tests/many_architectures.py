"""Makes small models of many architectures, for what the engine says of their memory. All weights are zero.

The files are sparse: 60 MB of weights take a few KB of disk and load like any other. What such a model says is nonsense.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from tests.architecture_tensors import (
    Metadata,
    Sizes,
    Tensors,
    gemma2_layer,
    gemma3_layer,
    gpt_oss_layer,
    llama_layer,
    mamba2_layer,
    mamba2_metadata,
    mamba_layer,
    mamba_metadata,
    mixtral_layer,
    model_tensors,
    phi3_layer,
    qwen2_layer,
    qwen3_layer,
    qwen3moe_layer,
    rwkv7_metadata,
    rwkv7_model,
    with_experts,
    with_heads,
)
from tests.tiny_model import BOS, CHAT_TEMPLATE, EOS, UNKNOWN, vocabulary

F16, F32, Q4_0, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "Q4_0", "Q8_0"))
ALIGNMENT = 32
# Norms, biases and what recurrences are sensitive to stay in f32, as converters write them.
PRECISE = (".bias", "norm.weight", "ssm_a", "ssm_d", "ssm_conv1d.weight", "ffn_gate_inp.weight", "lerp_fused.weight")


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


_LLAMA = Architecture(engine_name="llama", tensors=lambda s: model_tensors(s, llama_layer), metadata=with_heads)
_LLAMA_TIED = replace(_LLAMA, tensors=lambda s: model_tensors(s, llama_layer, tied=True))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "llama, tied": _LLAMA_TIED,
    "llama, tied, Q8_0": replace(_LLAMA_TIED, sizes=Sizes(quantization=Q8_0)),
    "llama, tied, Q4_0": replace(_LLAMA_TIED, sizes=Sizes(quantization=Q4_0)),
    "llama, 32 layers": replace(_LLAMA, sizes=Sizes(layers=32, embedding=256, head=32, feed_forward=896)),
    "qwen2": Architecture(
        engine_name="qwen2", tensors=lambda s: model_tensors(s, qwen2_layer, tied=True), metadata=with_heads
    ),
    "qwen3": Architecture(
        engine_name="qwen3",
        tensors=lambda s: model_tensors(s, qwen3_layer, tied=True),
        metadata=with_heads,
        sizes=Sizes(heads=16),  # its heads together are wider than its embedding
    ),
    "phi3": Architecture(engine_name="phi3", tensors=lambda s: model_tensors(s, phi3_layer), metadata=with_heads),
    "gemma2": Architecture(
        engine_name="gemma2",
        tensors=lambda s: model_tensors(s, gemma2_layer, tied=True),
        metadata=lambda s: with_heads(
            s, attention__sliding_window=s.window, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
    ),
    "gemma3": Architecture(
        engine_name="gemma3",
        tensors=lambda s: model_tensors(s, gemma3_layer, tied=True),
        metadata=lambda s: with_heads(s, attention__sliding_window=s.window),
    ),
    "gpt-oss": Architecture(
        engine_name="gpt-oss",
        tensors=lambda s: model_tensors(s, gpt_oss_layer),
        metadata=lambda s: with_experts(
            s, attention__sliding_window=s.window, expert_feed_forward_length=s.expert_feed_forward
        ),
        sizes=Sizes(window=128, experts=8, experts_used=4, feed_forward=512, expert_feed_forward=512),
    ),
    "mixtral": Architecture(
        engine_name="llama",
        tensors=lambda s: model_tensors(s, mixtral_layer),
        metadata=with_experts,
        sizes=Sizes(feed_forward=512, expert_feed_forward=512),
    ),
    "qwen3moe": Architecture(
        engine_name="qwen3moe",
        tensors=lambda s: model_tensors(s, qwen3moe_layer),
        metadata=lambda s: with_experts(s, expert_feed_forward_length=s.expert_feed_forward),
        sizes=Sizes(experts=32, experts_used=8, expert_feed_forward=96, heads=16),
    ),
    "gemma3, 26 layers": Architecture(
        engine_name="gemma3",
        tensors=lambda s: model_tensors(s, gemma3_layer, tied=True),
        metadata=lambda s: with_heads(s, attention__sliding_window=s.window),
        sizes=Sizes(layers=26, embedding=288, heads=4, kv_heads=1, head=256, feed_forward=1728, vocabulary=16384),
    ),
    "mamba": Architecture(
        engine_name="mamba", tensors=lambda s: model_tensors(s, mamba_layer), metadata=mamba_metadata
    ),
    "mamba2": Architecture(
        engine_name="mamba2", tensors=lambda s: model_tensors(s, mamba2_layer), metadata=mamba2_metadata
    ),
    "rwkv7": Architecture(engine_name="rwkv7", tensors=rwkv7_model, metadata=rwkv7_metadata),
}
