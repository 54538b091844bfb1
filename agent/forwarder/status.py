"""What a forwarder tells its agent: one small file, always whole, that nobody needs to read for the bytes to flow."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Exit statuses: 0 ended as its rules say.
NO_FREE_PORT, NO_ADDRESS, NO_TLS_FILES = 3, 4, 5
_LOGGED_REFUSALS = 100
_STDERR = 2


class Status(NamedTuple):
    """`up_bytes` went to the backend. `ended` is empty while it runs, then says why."""

    port: int
    attached: bool = False
    peer: str = ""
    connections: int = 0
    refused: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    ended: str = ""

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


class Published(Protocol):
    """What can be written as one JSON object."""

    def as_json(self) -> dict[str, Any]: ...


class StatusFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: Published | None = None

    def write(self, status: Published) -> None:
        """Replace the file in one step, if there is news. A full disk must not cut a running pool."""
        if status == self._written:
            return
        draft = draft_of(self._path)
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(status.as_json()) + "\n")
            draft.replace(self._path)
            self._written = status


def draft_of(path: Path) -> Path:
    """Where the next status is written first; one who is killed in the middle of that leaves it behind."""
    return path.with_name(path.name + ".new")


def read_status(path: Path) -> Status | None:
    """Return the newest status; None when there is none yet."""
    try:
        return Status(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # no file, or one of another version
        return None


def log(event: str, **fields: object) -> None:
    """To standard error, which is a file: a full disk must not cut a running pool here either."""
    line = json.dumps({"at": round(time.time(), 3), "event": event, **fields})
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode())


class RefusalLog:
    """Counts who was sent away, and logs the first of them: nobody fills a disk by knocking."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, peer: str, why: str, who: str) -> None:
        self.count += 1
        if self.count <= _LOGGED_REFUSALS:
            log("refused", peer=peer, why=why, **({"who": who} if who else {}))
