"""Makes the reciting model at a rate that people read at: 50 tokens/s on one core that reads 10 GB/s.

Its layers are 200 MB of zeros, which an engine multiplies like any other weights: they add nothing to what the embedding
and the output matrix say. In the file they are a hole, which takes no room on disk.
"""

import math
from pathlib import Path

import gguf
import numpy as np

from tests.tiny_model import EMBEDDING, LAYERS, NORMS, add_metadata, layer_shapes, reciting_matrices

FEED_FORWARD = 32_768
ALIGNMENT = 32


def write_slow_reciting_model(path: Path) -> None:
    """Write the model that says what `tests.tiny_model.write_reciting_model`'s does."""
    embeddings, output = (matrix.astype(np.float16) for matrix in reciting_matrices())
    said = {
        "token_embd.weight": embeddings,
        "output.weight": output,
        "output_norm.weight": np.ones(EMBEDDING, dtype=np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, "SOLLOL slow recital", FEED_FORWARD)
    for name, content in said.items():
        writer.add_tensor_info(name, content.shape, content.dtype, content.nbytes)
    zeros = sum(_add_layer(writer, f"blk.{layer}") for layer in range(LAYERS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(_aligned(file.seek(0, 2)))
        for content in said.values():
            file.write(content.tobytes())
            file.seek(_aligned(file.tell()))
        file.truncate(file.tell() + zeros)


def _add_layer(writer: gguf.GGUFWriter, prefix: str) -> int:
    """Announce one layer's tensors; returns the bytes that they take in the file."""
    shapes = dict.fromkeys(NORMS, (EMBEDDING,)) | layer_shapes(FEED_FORWARD)
    total = 0
    for kind, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(f"{prefix}.{kind}.weight", shape, dtype, size)
        total += _aligned(size)
    return total


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
