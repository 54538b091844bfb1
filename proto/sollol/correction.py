"""What real loads have shown of the memory model: what makes its figures those of the engine's log. Pure.

Agents learn corrections, heads apply them. `common.proto` documents the fields.
"""

from collections.abc import Iterable
from math import ceil

from msgspec import Struct

CPU_ID = "CPU"


class Correction(Struct, frozen=True, kw_only=True):
    """Factors for the memory model's figures, and bytes that each device needs beside them."""

    weights: float = 1.0
    kv: float = 1.0
    compute: float = 1.0
    added_bytes: int = 0


UNCORRECTED = Correction()


class MemoryCorrection(Struct, frozen=True, kw_only=True):
    """What one load has shown: of the model with this identity, under these conditions."""

    identity: str
    context_per_slot: int
    parallel: int
    kv_type: str
    ubatch: int
    layout: str
    correction: Correction


def scaled(size_bytes: int, factor: float) -> int:
    """Rounded up: a correction must not lose a byte."""
    return size_bytes if factor == 1.0 else ceil(size_bytes * factor)


def layout_of(split: Iterable[tuple[str, int]]) -> str:
    """Name how layers are dealt out, given the devices' ids and layers in order: "CPU:0 GPU:12 CPU:21".

    What a device needs does not depend on whose it is.
    """
    return " ".join(f"{'CPU' if device_id == CPU_ID else 'GPU'}:{layers}" for device_id, layers in split)
