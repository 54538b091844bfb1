"""Builds GGUF files for tests byte by byte: also those that no tool would write."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

STRING, ARRAY = 8, 9
F32, F16 = 0, 1


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(content: Any) -> bytes:
    """Type number and content: int as u32, float as f32, bool, str, or a list of one of them. Bytes are taken as is."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, list):
        first = value(content[0]) if content else struct.pack("<I", 4)
        items = b"".join(value(item)[4:] for item in content)
        return struct.pack("<I", ARRAY) + first[:4] + struct.pack("<Q", len(content)) + items
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    return struct.pack("<I", STRING) + text(content)


def entry(key: str, content: Any) -> bytes:
    return text(key) + value(content)


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Sequence[int]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file; `tensors` maps names to dims, their data are zeros in f32."""
    table, data = b"", b""
    for name, dims in (tensors or {}).items():
        table += tensor(name, dims, F32, len(data))
        size = 4
        for dim in dims:
            size *= dim
        data += bytes(-(-size // alignment) * alignment)
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors or {}), len(metadata))
    head += b"".join(entry(key, content) for key, content in metadata.items()) + table
    return head + bytes(-len(head) % alignment) + data


def llama_metadata(layers: int = 2, **more: Any) -> dict[str, Any]:
    """Enough metadata for the shape of a llama; `more` replaces or adds, `__` standing for a dot."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.context_length": 64,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }
    return metadata | {key.replace("__", "."): content for key, content in more.items()}


def llama_tensors(layers: int = 2) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, 3)}
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_q.weight"] = (8, 8)
    return tensors | {"output_norm.weight": (8,), "output.weight": (8, 3)}
