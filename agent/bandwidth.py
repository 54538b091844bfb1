"""How fast this machine's cores together read its memory: what generating a token on the CPU is bound by.

Measured once per boot and kept. The test reads a buffer that is larger than most caches with the C library's `memchr`,
called through ctypes, which releases the GIL, in one thread per core.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

FILE_NAME = "bandwidth.json"
_BUFFER_BYTES = 256 << 20
_SMALLEST_BUFFER_BYTES = 8 << 20
_FREE_FRACTION = 4
_MORE_PASSES = 5
_MEASURE_WITHIN_S = 0.4
_ABSENT, _FILL = 1, 2


class _Kept(Struct, frozen=True):
    boot_id: str
    cores: int
    bytes_per_s: float


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boot_id(root: Path = Path("/")) -> str:
    """Changes with every boot; empty where the system has none."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return ""


def cpu_bandwidth(state_dir: Path, *, boot: str, free_bytes: int) -> float:
    """The CPU's read bandwidth in bytes per second, measured at most once per boot. Blocks for up to half a second.

    Args:
        state_dir: Where the result is kept; not being able to write there only costs the next start a measurement.
        boot: This boot's id; empty: measure always.
        free_bytes: The test takes at most a quarter of it.

    Returns:
        0 when there is too little memory to tell.
    """
    path = state_dir / FILE_NAME
    cores = usable_cores()
    with suppress(OSError, msgspec.DecodeError):  # none yet, or not ours: measure
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        if boot and (kept.boot_id, kept.cores) == (boot, cores):
            return kept.bytes_per_s
    measured = measure(min(_BUFFER_BYTES, free_bytes // _FREE_FRACTION), cores)
    if measured > 0:
        with suppress(OSError):  # a read-only state directory is allowed
            _write(path, _Kept(boot, cores, measured))
    return measured


def measure(buffer_bytes: int, cores: int) -> float:
    """Read `buffer_bytes` a few times with `cores` threads; the best pass counts, in bytes per second."""
    if buffer_bytes < _SMALLEST_BUFFER_BYTES:
        return 0.0
    deadline_s = time.perf_counter() + _MEASURE_WITHIN_S
    size = buffer_bytes // cores
    buffers = [(ctypes.c_char * size)() for _ in range(cores)]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    _timed(ctypes.memset, addresses, _FILL, size)  # without it every page would be the kernel's one page of zeros
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    memchr.restype = ctypes.c_void_p
    best_s = _timed(memchr, addresses, _ABSENT, size)
    for _ in range(_MORE_PASSES):
        if time.perf_counter() + best_s > deadline_s:
            break
        best_s = min(best_s, _timed(memchr, addresses, _ABSENT, size))
    return size * cores / best_s


def _timed(touch: Callable[[int, int, int], object], addresses: list[int], byte: int, size: int) -> float:
    """Run `touch(address, byte, size)` on every address at once, and return the seconds until all are done."""
    threads = [threading.Thread(target=touch, args=(address, byte, size), daemon=True) for address in addresses]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def _write(path: Path, kept: _Kept) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(kept))
    fresh.replace(path)
