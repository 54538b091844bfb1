"""What loads on this node have shown of the memory model: kept over restarts, a bounded number, the newest last."""

from pathlib import Path

import structlog
from sollol import kept
from sollol.correction import MemoryCorrection

FILE_NAME = "memory.json"
VERSION = 2
MOST_KEPT = 64

log = structlog.get_logger(__name__)


class Learned:
    """Owner of the file, and of what is in it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        self._corrections = (kept.load(self._path, tuple[MemoryCorrection, ...], version=VERSION) or ())[-MOST_KEPT:]

    def corrections(self) -> tuple[MemoryCorrection, ...]:
        return self._corrections

    def learn(self, found: MemoryCorrection) -> None:
        """Keep it, in place of what the same model under the same conditions in the same layout showed before."""
        others = [known for known in self._corrections if _key(known) != _key(found)]
        self._corrections = (*others, found)[-MOST_KEPT:]
        try:
            kept.save(self._path, self._corrections, version=VERSION, durable=False)
        except OSError as error:  # known until the next restart all the same
            log.warning("memory_file_not_written", path=str(self._path), error=str(error))


def _key(record: MemoryCorrection) -> tuple[object, ...]:
    return (record.identity, record.context_per_slot, record.parallel, record.kv_type, record.ubatch, record.layout)
