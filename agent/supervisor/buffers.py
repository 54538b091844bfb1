"""What an engine's log says of the memory that it has taken, per device. Pure."""

import re
from collections.abc import Iterable

from msgspec import Struct

MIB = 1024**2
HOST = "CPU"
# The engine begins each attempt at loading with it. Before the last one it may have logged sizes of attempts.
BEGINNING = "loading model tensors"

# `RPC0[192.168.1.20:7500] model buffer size = 1.50 MiB`: backends are known by their address, since the number counts
# the devices of one backend. What a GPU's driver keeps on the host (`CUDA_Host`) is the host's.
_SIZE = re.compile(r"(\S+) +(model|KV|RS|compute|output) buffer size = +(\d+\.\d\d) MiB", re.ASCII)
_MAPPED = "_Mapped"
_BACKEND = re.compile(r"RPC(\d+)\[(.+)\]", re.ASCII)
_ON_HOST = re.compile(r"CPU(?:_\w+)?|\w+_Host", re.ASCII)


class Buffers(Struct, kw_only=True):
    """Bytes on one device; each line of the log is rounded to 0.01 MiB.

    `mapped`: part of the model's file that is in memory only as long as there is room; all of the model, when no other
    memory was taken for it, otherwise also the originals of what was copied (repacked). `output`: what answers are read
    from; the memory model counts it with the compute buffer. Every device in use has a compute buffer: where none is
    found, the log has lost a line and says nothing.
    """

    model: int = 0
    mapped: int = 0
    kv: int = 0
    compute: int = 0
    output: int = 0


def logged_buffers(lines: Iterable[str]) -> dict[str, Buffers]:
    """Buffers by device: "CPU", what `lent_device` says, or the engine's name of a local GPU.

    Recurrent states count as KV, as the memory model has it.
    """
    found: dict[str, Buffers] = {}
    for line in lines:
        if BEGINNING in line:
            found = {}
        elif size := _SIZE.search(line):
            device, kind = _device(size[1]), _kind(size[1], size[2])
            buffers = found.setdefault(device, Buffers())
            setattr(buffers, kind, getattr(buffers, kind) + round(float(size[3]) * MIB))
    return found


def lent_device(address: str, number: int) -> str:
    """The name here of a backend's device: the backend's address, for all but its first one with the number."""
    return f"{address}/{number}" if number else address


def _device(name: str) -> str:
    if backend := _BACKEND.fullmatch(name):
        return lent_device(backend[2], int(backend[1]))
    return HOST if _ON_HOST.fullmatch(name) else name.removesuffix(_MAPPED)


def _kind(name: str, logged: str) -> str:
    if logged == "model":
        return "mapped" if name.endswith(_MAPPED) else "model"
    return "kv" if logged in {"KV", "RS"} else logged
