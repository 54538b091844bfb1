"""What commands print: JSON for programs, aligned columns for people, colour only where it is wanted."""

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO


def print_json(content: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns two spaces apart; the last one is not padded."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    for row in (head, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        sys.stdout.write((bold(line) if row is head else line) + "\n")


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if wants_colour(sys.stdout) else text


def wants_colour(stream: TextIO) -> bool:
    """On a terminal that can, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class StatusLine:
    """One line on stderr that is overwritten; nothing at all when stderr is no terminal."""

    def __init__(self) -> None:
        self._shown = False
        self._active = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._active:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
