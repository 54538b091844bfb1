"""The file of keys: followed by the head, written by `sollol keys`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from sollol import kept
from sollol.errors import Reason, Refusal, SollolError, refuse

from sollold import keys
from sollold.keys import Key
from sollold.places import SERVICE_DIRECTORY, state_directory

log = structlog.get_logger(__name__)

NAME = "keys.json"

Stamp = tuple[int, int, int]
_GONE: Stamp = (0, 0, 0)


def keys_path(setting: str, state_dir: str, environ: Mapping[str, str], service: Path = SERVICE_DIRECTORY) -> Path:
    """Where the keys are; "auto": in the head's state directory, as `state_dir` says."""
    return Path(setting).expanduser() if setting != "auto" else state_directory(state_dir, environ, service) / NAME


class KeyFile:
    """The keys as the file has them now: looked at for every request, read when it has changed.

    A file that cannot be used, or is gone after it was there, refuses everybody: what it said may be a revocation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: Stamp | None = None
        self._keys: tuple[Key, ...] = ()
        self._problem: Refusal | None = None

    def current(self) -> tuple[Key, ...]:
        """Empty while there has never been a file.

        Raises:
            SollolError: KEYS_UNREADABLE.
        """
        try:
            self._follow()
        except OSError as error:  # it may pass, such as too many open files: it is read again for the next request
            if self._stamp is not None:
                self._stamp = _GONE
            self._fail(str(error))
        except ValueError as error:  # msgspec's errors are ValueErrors
            self._fail(str(error))
        if self._problem is not None:
            raise SollolError(self._problem)
        return self._keys

    def _follow(self) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            if self._stamp is not None:
                raise
            self._problem = None
            return
        stamp = (found.st_ino, found.st_ctime_ns, found.st_size)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # what cannot be understood is not read again until it changes
        self._keys = keys.parse(self.path.read_bytes())
        self._problem = None
        log.info("keys_read", path=str(self.path), count=len(self._keys))

    def _fail(self, problem: str) -> None:
        if self._problem is None:
            log.error("keys_unreadable", path=str(self.path), problem=problem, effect="every request is refused")
        message = "this head cannot read its API keys, so it admits nobody; its log says why"
        self._problem = refuse(Reason.KEYS_UNREADABLE, message, retryable=True).refusal


def change(path: Path, edit: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> tuple[Key, ...]:
    """Replace the file by one with the keys that `edit` makes of the present ones; one change at a time.

    Raises:
        SollolError: KEYS_UNREADABLE, or what `edit` raises; the file is as it was.
        OSError: it cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with kept.locked(path.parent):
        edited = edit(read(path))
        _replace(path, keys.render(edited))
    return edited


def read(path: Path) -> tuple[Key, ...]:
    """Raises SollolError: KEYS_UNREADABLE. Empty when there is no file."""
    try:
        return keys.parse(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise refuse(Reason.KEYS_UNREADABLE, f"{path}: {error}; repair it, or remove it and all keys with it") from None


def _replace(path: Path, content: bytes) -> None:
    owner = path.parent.stat()  # root writes for the service's user, who must be able to read it
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    kept.sync_directory(path.parent)  # a revocation that was said to hold outlives a loss of power
