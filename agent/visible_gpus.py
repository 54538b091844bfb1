"""Which NVIDIA GPUs CUDA shows to an engine, in its order. Pure. NVML shows all, whatever the environment says."""

from collections.abc import Mapping, Sequence

from agent.gpus import NVIDIA, Gpu

CUDA = "CUDA"


def shown_by_cuda(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, in its order; all in NVML's order where it cannot be told.

    CUDA stops at the first entry that names nothing. Its numbers are NVML's where it orders by bus, and where all GPUs
    are of one kind; it puts the fastest first otherwise, and names then tell them apart.
    """
    own = [gpu for gpu in gpus if gpu.vendor == NVIDIA]
    entries = environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return tuple(own)
    by_bus = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in own}) == 1
    shown: list[Gpu] = []
    for entry in (part.strip() for part in entries.split(",")):
        if entry.startswith("MIG-") or (entry.isdecimal() and not by_bus):
            return tuple(own)
        gpu = _named(own, entry)
        if gpu is None:
            break
        shown.append(gpu)
    return tuple(shown)


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None
