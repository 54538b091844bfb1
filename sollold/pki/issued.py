"""What an authority has issued: one line for each certificate, so that whoever has one can be revoked."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from sollol import kept
from sollol.certificates import Certificate
from sollol.identity import Identity, parse


class Issued(Struct, frozen=True):
    """A certificate that was made here: whose, and from when until when."""

    serial: str
    identity: Identity
    ends_s: float
    made_s: float


def record(path: Path, made: Certificate) -> None:
    """Add a line. It is on the disk on return: only then may anybody have the certificate."""
    assert made.identity is not None
    line = f"{made.serial} {made.identity.uri} {made.not_after_s:.0f} {time.time():.3f}\n"
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        after = b"" if file.read() in (b"", b"\n") else b"\n"  # half a line, of when power was lost
        file.write(after + line.encode())
        file.flush()
        os.fsync(file.fileno())
    kept.sync_directory(path.parent)


def read(path: Path) -> Iterator[Issued]:
    """Every line, the oldest first; nothing without a file."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return (found for line in text.splitlines() if (found := _issued(line)) is not None)


def _issued(line: str) -> Issued | None:
    """None for half a line: its certificate was given to nobody."""
    try:
        serial, uri, ends_s, made_s = line.split()
        identity = parse(uri)
        return Issued(serial, identity, float(ends_s), float(made_s)) if identity is not None else None
    except ValueError:
        return None
