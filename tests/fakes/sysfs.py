# ruff: noqa: N802, N818 - the fake has NVML's own names
"""Fake drivers: a tree that looks like amdgpu's sysfs and cgroups, and an object that looks like NVML."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

GIB = 1 << 30


def write_tree(root: Path, files: dict[str, str | int]) -> Path:
    """Write each value to its path below `root`."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n")
    return root


def amd_card(root: Path, card: int, *, vram: tuple[int, int], gtt: tuple[int, int], **more: str) -> None:
    """One card; `vram` and `gtt` are (total, used), `more` further files of its device folder."""
    folder = f"sys/class/drm/card{card}/device"
    files = {"vendor": "0x1002", **more}
    for name, (total, used) in (("vram", vram), ("gtt", gtt)):
        files |= {f"mem_info_{name}_total": total, f"mem_info_{name}_used": used}
    write_tree(root, {f"{folder}/{name}": content for name, content in files.items()})


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - NVML's own name
    pass


@dataclass
class FakeGpu:
    """Sizes in bytes; None: NVML says NOT_SUPPORTED, as on machines with unified memory."""

    name: str | bytes
    total: int | None
    free: int = 0
    bus_bits: int | None = None
    clock_mhz: int = 0
    uuid: str | None = ""
    lost: bool = False


@dataclass
class FakeNvml:
    """As much of the NVML module as the agent calls. `broken`: every call fails; `before`: runs first in each count."""

    gpus: list[FakeGpu]
    broken: bool = False
    before: object = None
    inits: int = 0
    NVML_CLOCK_MEM: int = 2
    NVMLError: type = field(default=NVMLError)
    NVMLError_NotSupported: type = field(default=NVMLError_NotSupported)

    def nvmlInit(self) -> None:
        self._check()
        self.inits += 1

    def nvmlDeviceGetCount(self) -> int:
        if callable(self.before):
            self.before()
        self._check()
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].lost:
            raise NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        if gpu.uuid is None:
            raise NVMLError_NotSupported
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str | bytes:
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        if gpu.total is None:
            raise NVMLError_NotSupported
        return SimpleNamespace(total=gpu.total, free=gpu.free, used=gpu.total - gpu.free)

    def nvmlDeviceGetMemoryBusWidth(self, gpu: FakeGpu) -> int:
        if gpu.bus_bits is None:
            raise NVMLError_NotSupported
        return gpu.bus_bits

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, clock: int) -> int:
        assert clock == self.NVML_CLOCK_MEM
        return gpu.clock_mhz

    def _check(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")
