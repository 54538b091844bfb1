"""What the drivers say of the GPUs: NVIDIA through NVML, AMD through sysfs. Blocking; `probe` runs it in a thread.

Unified memory is RAM under another name: such a reading says so, and carries only what the driver limits (AMD's GTT).
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

NVIDIA, AMD = "NVIDIA", "AMD"

_AMD_PCI_VENDOR = "0x1002"
_GIB = 1 << 30
_CARVE_OUT_MAX = 4 * _GIB
_GTT_MIN = 8 * _GIB
_GTT_OVER_VRAM = 4


class Gpu(Struct, frozen=True, kw_only=True):
    """One GPU as its driver sees it; `index` counts within the vendor, in the driver's order.

    With `unified`, total and free are the driver's own limits on its share of RAM, or None where it has none.
    `lost`: why nothing is free there any more; the rest is what its driver said last.
    """

    vendor: str
    index: int
    name: str
    total_bytes: int | None
    free_bytes: int | None
    unified: bool = False
    bandwidth_bytes_per_s: float = 0.0
    lost: str = ""
    uuid: str = ""


class DriverLost(Exception):  # noqa: N818 - a condition that the probe lives through
    """Raised when a driver that has answered before does not any more."""


class Driver(Protocol):
    """A source of readings. `read` blocks, possibly for ever, and raises DriverLost."""

    @property
    def vendor(self) -> str: ...
    @property
    def problem(self) -> str:
        """Why it cannot be asked at all; empty when it can."""
        ...

    def read(self) -> tuple[Gpu, ...]: ...


class Nvidia:
    """NVIDIA's GPUs through nvidia-ml-py, when a driver is loaded.

    Args:
        load: Gives the NVML module, or raises ImportError.
    """

    vendor = NVIDIA

    def __init__(self, load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> None:
        self._load = load
        self._nvml: Any = None
        self._answered = False
        self.problem = ""
        self._seen: dict[int, Gpu] = {}

    def read(self) -> tuple[Gpu, ...]:
        """Every GPU, in NVML's order; none without a driver. A driver that comes later is noticed."""
        try:
            nvml = self._nvml or self._load()
        except ImportError as error:
            self.problem = f"NVML cannot be loaded: {error}; install nvidia-ml-py"
            return ()
        try:
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml, self._answered, self.problem = nvml, True, ""
            gpus = [self._gpu_or_lost(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            return tuple(gpu for gpu in gpus if gpu is not None)
        except nvml.NVMLError as error:
            self._nvml = None  # initialised again next time: the driver may be reloaded under us
            if not self._answered:
                self.problem = f"NVML cannot be loaded: {error}"
                return ()
            raise DriverLost(f"{NVIDIA}: {error}") from error

    def _gpu_or_lost(self, nvml: Any, index: int) -> Gpu | None:
        """One GPU that falls off the bus takes no other with it; one that was never seen cannot be named."""
        try:
            gpu = self._seen[index] = self._gpu(nvml, index)
        except nvml.NVMLError as error:
            seen = self._seen.get(index)
            return None if seen is None else replace(seen, lost=str(error) or "lost")
        return gpu

    def _gpu(self, nvml: Any, index: int) -> Gpu:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = _decoded(nvml.nvmlDeviceGetName(handle)), ""
        with suppress(nvml.NVMLError_NotSupported):  # then it cannot be named in CUDA_VISIBLE_DEVICES either
            uuid = _decoded(nvml.nvmlDeviceGetUUID(handle))
        total = free = 0
        with suppress(nvml.NVMLError_NotSupported):  # a GPU without memory of its own
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total, free = int(memory.total), int(memory.free)
        own = total > 0
        return Gpu(
            vendor=NVIDIA,
            index=index,
            name=name,
            uuid=uuid,
            total_bytes=total if own else None,
            free_bytes=free if own else None,
            unified=not own,
            bandwidth_bytes_per_s=_nvml_bandwidth(nvml, handle) if own else 0.0,
        )


def _decoded(text: str | bytes) -> str:
    """Older versions of the library give bytes."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def _nvml_bandwidth(nvml: Any, handle: Any) -> float:
    """Bus width times clock, two transfers per clock: what NVML's clock means for GDDR and HBM alike."""
    try:
        bits = nvml.nvmlDeviceGetMemoryBusWidth(handle)
        mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
    except nvml.NVMLError:  # not told on every board
        return 0.0
    return float(bits / 8 * mhz * 1e6 * 2)


class Amd:
    """AMD's GPUs through sysfs, which needs no library.

    Args:
        root: Where `sys` is mounted.
    """

    vendor = AMD
    problem = ""  # sysfs is always there

    def __init__(self, root: Path = Path("/")) -> None:
        self._cards = root / "sys/class/drm"

    def read(self) -> tuple[Gpu, ...]:
        folders = sorted(self._cards.glob("card[0-9]*/device"), key=_card_number)
        folders = [folder for folder in folders if _text(folder / "vendor") == _AMD_PCI_VENDOR]
        gpus = (_amd_gpu(folder, index) for index, folder in enumerate(folders))
        return tuple(gpu for gpu in gpus if gpu is not None)


def _card_number(folder: Path) -> int:
    digits = folder.parent.name.removeprefix("card")
    return int(digits) if digits.isdigit() else 1 << 30  # connectors such as card0-DP-1 have no device of their own


def _amd_gpu(folder: Path, index: int) -> Gpu | None:
    vram_total, vram_used = _number(folder / "mem_info_vram_total"), _number(folder / "mem_info_vram_used")
    gtt_total, gtt_used = _number(folder / "mem_info_gtt_total"), _number(folder / "mem_info_gtt_used")
    if vram_total is None or vram_used is None:
        return None  # not amdgpu's
    unified = gtt_total is not None and gtt_used is not None and _integrated(folder, vram_total, gtt_total)
    total, used = (gtt_total, gtt_used) if unified else (vram_total, vram_used)
    assert total is not None
    assert used is not None
    return Gpu(
        vendor=AMD,
        index=index,
        name=_text(folder / "product_name") or "AMD GPU",
        total_bytes=total,
        free_bytes=max(0, total - used),
        unified=unified,
    )


def _integrated(folder: Path, vram_bytes: int, gtt_bytes: int) -> bool:
    """Ollama's rule: no sign of a board with memory chips, a small carve-out, and a GTT that dwarfs it."""
    discrete = (folder / "mem_info_vram_vendor").exists() or (folder / "board_info").exists()
    return not discrete and vram_bytes <= _CARVE_OUT_MAX and gtt_bytes >= max(_GTT_MIN, _GTT_OVER_VRAM * vram_bytes)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # absent, or the card has just gone
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def default_drivers(root: Path = Path("/")) -> Sequence[Driver]:
    return (Nvidia(), Amd(root))
