"""What a killed daemon leaves behind: engines run in sessions of their own and outlive it."""

import ctypes
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_GONE_WITHIN_S = 5.0  # a killed process is gone in milliseconds, unless the kernel itself is stuck


def adopt_orphans() -> None:
    """Let the kernel give us, not init, the children of a daemon that dies. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> list[str]:
    """Kill every process below this one, and return their names. Call it when all that we started has ended."""
    left = [process for process in psutil.Process().children(recursive=True) if _runs(process)]
    killed = []
    for process in left:
        try:
            killed.append(f"{process.name()} (pid {process.pid})")
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it ended just now
    psutil.wait_procs(left, timeout=_GONE_WITHIN_S)
    return killed


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
