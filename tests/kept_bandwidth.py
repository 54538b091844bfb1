"""What an agent that ran here before would have left: how fast the memory is, so that the next one need not measure.

A measurement takes half a second of all cores' memory, and agents of one machine take turns at it: with a new state
directory for each of its hundreds of agents the suite would measure for minutes.
"""

import functools
import tempfile
from pathlib import Path

import psutil

from agent.bandwidth import FILE_NAME, boot_id, cpu_bandwidth, usable_cores


def keep_bandwidth(state_dir: Path, *, threads: int | None = None) -> None:
    """Leave it in the state directory of an agent whose engines have so many threads, of all cores when not told."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (state_dir / FILE_NAME).exists():
        (state_dir / FILE_NAME).write_bytes(_measured(threads or usable_cores()))


@functools.cache
def _measured(threads: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sollol-bandwidth-") as directory:
        cpu_bandwidth(Path(directory), boot=boot_id(), free_bytes=psutil.virtual_memory().available, threads=threads)
        return (Path(directory) / FILE_NAME).read_bytes()
