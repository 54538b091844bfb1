"""How fast as many threads as an engine uses read this machine's memory: what generating on the CPU is bound by.

Measured once per boot and kept. The test reads a buffer that is larger than most caches with the C library's `memchr`,
called through ctypes, which releases the GIL. Fewer threads than cores read slower: half as fast here, 1 of 2.
"""

import ctypes
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct

FILE_NAME = "bandwidth.json"
_BUFFER_BYTES = 256 << 20
_SMALLEST_BUFFER_BYTES = 8 << 20
_FREE_FRACTION = 4
_MORE_PASSES = 5
_MEASURE_WITHIN_S = 0.4
_TURN_WITHIN_S = 3.0
_TURN_POLL_S = 0.02
_BOOT_ID = "proc/sys/kernel/random/boot_id"
_ABSENT, _FILL = 1, 2


class _Kept(Struct, frozen=True):
    boot_id: str
    threads: int
    bytes_per_s: float


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boot_id(root: Path = Path("/")) -> str:
    """Changes with every boot; empty where the system has none."""
    try:
        return (root / _BOOT_ID).read_text().strip()
    except OSError:  # no Linux
        return ""


def cpu_bandwidth(state_dir: Path, *, boot: str, free_bytes: int, threads: int) -> float:
    """The CPU's read bandwidth in bytes per second, measured at most once per boot and number of threads.

    Blocks for up to half a second, and while another agent of this machine measures.

    Args:
        state_dir: Where the result is kept; not being able to write there only costs the next start a measurement.
        boot: This boot's id; empty: measure always.
        free_bytes: The test takes at most a quarter of it.
        threads: Those of an engine.

    Returns:
        0 when there is too little memory to tell.
    """
    path = state_dir / FILE_NAME
    with suppress(OSError, msgspec.DecodeError):  # none yet, or not ours: measure
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        if boot and (kept.boot_id, kept.threads) == (boot, threads):
            return kept.bytes_per_s
    with _turn():
        measured = measure(min(_BUFFER_BYTES, free_bytes // _FREE_FRACTION), threads)
    if measured > 0:
        with suppress(OSError):  # a read-only state directory is allowed
            _write(path, _Kept(boot, threads, measured))
    return measured


@contextmanager
def _turn() -> Iterator[None]:
    """Keep agents that start together on one machine from measuring what the others leave them: one at a time.

    The lock is on a file that every Linux has and nobody needs to make. Whoever else holds it costs us a wait only.
    """
    try:
        descriptor = os.open(Path("/") / _BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no Linux
        yield
        return
    try:
        deadline_s = time.monotonic() + _TURN_WITHIN_S
        while not _locked(descriptor) and time.monotonic() < deadline_s:
            time.sleep(_TURN_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another agent's turn, or a file system without locks
        return False
    return True


def measure(buffer_bytes: int, threads: int) -> float:
    """Read `buffer_bytes` a few times with so many threads; the best pass counts, in bytes per second."""
    if buffer_bytes < _SMALLEST_BUFFER_BYTES:
        return 0.0
    deadline_s = time.perf_counter() + _MEASURE_WITHIN_S
    size = buffer_bytes // threads
    buffers = [(ctypes.c_char * size)() for _ in range(threads)]
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
    return size * threads / best_s


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
