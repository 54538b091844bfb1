"""Which of the engine's devices is which of the drivers' GPUs. Pure.

The engine's list says what layers can be put on; the drivers say what is free right now. The engine orders CUDA
devices as it likes and knows nothing of NVML's indices, so the name decides first, then the size, then the order.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from agent.gpus import AMD, NVIDIA, Gpu
from agent.visible_gpus import CUDA, shown_by_cuda

INTEL, APPLE = "Intel", "Apple"

_VENDOR_BY_FAMILY = {"CUDA": NVIDIA, "ROCM": AMD, "HIP": AMD, "METAL": APPLE, "MTL": APPLE, "SYCL": INTEL}
_VENDOR_WORDS = {
    NVIDIA: re.compile(r"nvidia|geforce|quadro|tesla", re.IGNORECASE),
    AMD: re.compile(r"\bamd\b|radeon|radv", re.IGNORECASE),
    INTEL: re.compile(r"\bintel\b", re.IGNORECASE),
    APPLE: re.compile(r"\bapple\b", re.IGNORECASE),
}
_INTEL_BOARD = re.compile(r"\barc\b.*\b[ab]\d{2,3}\b", re.IGNORECASE)
_NEAR = 8  # sizes that differ by less than an eighth are taken for the same: drivers keep some back


class EngineDevice(Protocol):
    """One line of the engine's own list of devices."""

    @property
    def device_id(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...


def vendor_of(device: EngineDevice) -> str:
    """Whose GPU it is, by the backend's name or by the words of its description; empty when neither tells."""
    family = device.device_id.rstrip("0123456789").upper()
    if family in _VENDOR_BY_FAMILY:
        return _VENDOR_BY_FAMILY[family]
    return next((vendor for vendor, words in _VENDOR_WORDS.items() if words.search(device.description)), "")


def shares_ram(device: EngineDevice) -> bool:
    """Whether a GPU that only the engine knows has no memory of its own: Apple's, and Intel's but for Arc boards."""
    vendor = vendor_of(device)
    return vendor == APPLE or (vendor == INTEL and not _INTEL_BOARD.search(device.description))


def match(
    engine: Sequence[EngineDevice], gpus: Sequence[Gpu], environ: Mapping[str, str]
) -> list[tuple[EngineDevice | None, Gpu | None]]:
    """Pair the engine's devices with the drivers' GPUs; `environ` is the engine's.

    Engine devices come first and in order, then the GPUs that it does not list. A GPU that two of the engine's
    backends list (CUDA0 and Vulkan0) is one memory: it counts once, for the first of them.
    """
    left = list(gpus)
    shown = shown_by_cuda(gpus, environ)
    pairs: list[tuple[EngineDevice | None, Gpu | None]] = []
    for device in engine:
        if device.total_bytes <= 0:  # BLAS and the like: a way to compute, not a memory
            continue
        vendor = vendor_of(device)
        own = [gpu for gpu in (shown if device.device_id.startswith(CUDA) else gpus) if gpu.vendor == vendor]
        own = [gpu for gpu in own if gpu in left]
        if own:
            chosen = min(own, key=lambda gpu: _distance(device, gpu))
            left.remove(chosen)
            pairs.append((device, chosen))
        elif not any(gpu.vendor == vendor for gpu in gpus):
            pairs.append((device, None))
    return pairs + [(None, gpu) for gpu in left]


def _distance(device: EngineDevice, gpu: Gpu) -> tuple[bool, bool]:
    total = gpu.total_bytes
    return (
        not _same_name(device.description, gpu.name),
        total is None or abs(total - device.total_bytes) * _NEAR > total,
    )


def _same_name(one: str, other: str) -> bool:
    one, other = one.casefold(), other.casefold()
    return bool(one and other) and (one in other or other in one)
