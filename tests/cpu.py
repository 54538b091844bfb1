"""What something costs, in time of this process's own processors: others' work and waiting do not count."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Cost:
    """`cpu_s` is known once the block is left."""

    cpu_s = float("nan")


@contextmanager
def cost() -> Iterator[Cost]:
    """Measure a block, without a collection of what thousands of other tests have left: one alone takes 0.2 s."""
    measured, was_on = Cost(), gc.isenabled()
    gc.disable()
    began_s = time.process_time()
    try:
        yield measured
    finally:
        measured.cpu_s = time.process_time() - began_s
        if was_on:
            gc.enable()
