"""What loads on this node have shown of the memory model: kept over restarts, a bounded number, the newest last."""

from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct
from sollol.correction import MemoryCorrection

FILE_NAME = "memory.json"
VERSION = 1
MOST_KEPT = 64

log = structlog.get_logger(__name__)


class _Kept(Struct, frozen=True):
    version: int
    corrections: tuple[MemoryCorrection, ...]


class Learned:
    """Owner of the file, and of what is in it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        self._corrections = _read(self._path)

    def corrections(self) -> tuple[MemoryCorrection, ...]:
        return self._corrections

    def learn(self, found: MemoryCorrection) -> None:
        """Keep it, in place of what the same model under the same conditions in the same layout showed before."""
        others = [known for known in self._corrections if _key(known) != _key(found)]
        self._corrections = (*others, found)[-MOST_KEPT:]
        try:
            _write(self._path, _Kept(VERSION, self._corrections))
        except OSError as error:  # known until the next restart all the same
            log.warning("memory_file_not_written", path=str(self._path), error=str(error))


def _key(record: MemoryCorrection) -> tuple[object, ...]:
    return (record.identity, record.context_per_slot, record.parallel, record.kv_type, record.ubatch, record.layout)


def _read(path: Path) -> tuple[MemoryCorrection, ...]:
    """What the file holds; one that says nothing to this version is put aside."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        if kept.version != VERSION:
            raise msgspec.ValidationError(f"version {kept.version}, not {VERSION}")
    except FileNotFoundError:
        return ()
    except OSError as error:
        log.warning("memory_file_not_read", path=str(path), error=str(error))
        return ()
    except msgspec.DecodeError as error:
        log.warning("memory_file_corrupt", path=str(path), error=str(error))
        with suppress(OSError):  # it cannot be put aside: then it is written over
            path.replace(path.with_name(path.name + ".corrupt"))
        return ()
    return kept.corrections[-MOST_KEPT:]


def _write(path: Path, kept: _Kept) -> None:
    """In one step: a reader finds the old one or the new one."""
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(kept))
    draft.replace(path)
