"""Whether anybody else used the processors meanwhile: what was measured then says nothing."""

import os
import time
from collections.abc import Iterable

import psutil


class Others:
    """Everything but this process, `roots`, and all below them, from now on."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = [os.getpid(), *roots]
        self._began_s, self._all_s, self._ours_s = time.monotonic(), _all_s(), self._ours()

    @property
    def cores_used(self) -> float:
        """On average; 1.0 is one processor all of the time."""
        others_s = (_all_s() - self._all_s) - (self._ours() - self._ours_s)
        return others_s / (time.monotonic() - self._began_s)

    def _ours(self) -> float:
        family: dict[int, float] = {}
        for root in self._roots:
            for process in _family(root):
                try:
                    times = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                family[process.pid] = times.user + times.system
        return sum(family.values())


def _family(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _all_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))
