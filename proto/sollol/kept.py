"""Small values in the state directory that outlive a restart. What cannot be understood is set aside, never obeyed."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
from msgspec import Struct

log = structlog.get_logger(__name__)

T = TypeVar("T")


class _File(Struct):
    version: int
    content: msgspec.Raw


def load(path: Path, kind: type[T], *, version: int) -> T | None:
    """What `save` wrote; None when there is nothing.

    A file that is damaged, or of another version, is renamed to `NAME.bad-<unix seconds>` and told of: the start goes
    on without it.
    """
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        if file.version == version:
            return msgspec.json.decode(file.content, type=kind)
        problem = f"it has version {file.version}, not {version}"
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("kept_file_unreadable", path=str(path), problem=str(error))
        return None
    except msgspec.DecodeError as error:
        problem = str(error)
    log.warning("kept_file_set_aside", path=str(path), problem=problem)
    try:
        path.replace(path.with_name(f"{path.name}.bad-{time.time():.0f}"))
    except OSError as error:
        log.warning("kept_file_not_set_aside", path=str(path), problem=str(error))
    return None


def save(path: Path, content: object, *, version: int, durable: bool = True) -> None:
    """Replace the file by a whole new one, for this user's eyes only. Blocks on the disk.

    With `durable` it outlives a loss of power, too, which takes longer.

    Raises:
        OSError: the directory cannot be written, or is full; the old file is as it was.
    """
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - Path cannot open a descriptor
        file.write(msgspec.json.encode({"version": version, "content": content}))
        if durable:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)
    if durable:
        sync_directory(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep out everybody else who changes files of this directory under this lock; waits for them."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Only then is the new name on the disk, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
