"""Finds GGUF files below a directory, within bounds, and never outside of what the operator named."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from sollol.errors import Reason, Refusal
from sollol.gguf_split import split_siblings
from sollol.names import LONGEST_NAME, quoted

from agent.told_once import warn_once

DEEPEST = 8  # directories below a root
MOST_ENTRIES = 50_000  # looked at below one root
_ODD_CHARACTERS = re.compile(r"[^A-Za-z0-9._:/@+-]+")
_PART_SUFFIX = re.compile(r"-\d{5}-of-\d{5}\Z", re.ASCII)


class FoundModel(Struct, frozen=True, kw_only=True):
    """Files that make up one model, not yet opened.

    Attributes:
        parts: All files, the first part first. Links are not resolved: the engine finds the others by their names.
        names: What to call it, best first. The first one that is still free becomes its name.
        fallback_names: Longer names, used when all of `names` are taken.
        problem: Why it cannot be used, when that is known already.
    """

    parts: tuple[Path, ...]
    names: tuple[str, ...]
    source: str
    fallback_names: tuple[str, ...] = ()
    problem: Refusal | None = None


def find_in_directory(root: Path, allowed: Sequence[Path]) -> Iterator[FoundModel]:
    """Models in a plain directory and those below it, in the order of their paths.

    Named by file stem; by path below the root too. `allowed`: resolved directories that links may lead into.
    """
    for first in first_parts(root):
        relative = first.relative_to(root)
        in_root = model_name(str(relative.parent / stem(first)))
        yield FoundModel(
            parts=split_siblings(first),
            names=tuple(dict.fromkeys((model_name(stem(first)), in_root))),
            fallback_names=(model_name(f"{root.name}/{in_root}"),),
            source="directory",
            problem=link_problem(split_siblings(first), allowed),
        )


def stem(path: Path) -> str:
    """The file's name without `.gguf` and without the number of its part."""
    return _PART_SUFFIX.sub("", path.name.removesuffix(".gguf"))


def model_name(text: str) -> str:
    """`text` with what `check_model_name` refuses replaced: every listed model can be asked for by its name."""
    plain = _ODD_CHARACTERS.sub("-", text)
    while ".." in plain:
        plain = plain.replace("..", ".")
    return plain.lstrip("/-")[:LONGEST_NAME] or "unnamed"


def first_parts(root: Path) -> Iterator[Path]:
    """Every model's first part below `root`: split models once, also when the first part is the missing one."""
    seen: set[Path] = set()
    for path in _gguf_files(root):
        first = split_siblings(path)[0]
        if first not in seen and "mmproj" not in path.name.lower():  # projectors for images are no models
            seen.add(first)
            yield first


def link_problem(parts: Sequence[Path], allowed: Sequence[Path]) -> Refusal | None:
    """Refuse a file whose link leads out of the `allowed` directories: a link must not publish any file there is."""
    for part in parts:
        target = real_path(part)
        if not any(target.is_relative_to(root) for root in allowed):
            return Refusal(
                reason=Reason.PATH_NOT_ALLOWED,
                message=f"{quoted(part.name)} is a link out of the model directories; "
                "add the directory that it leads to to model_dirs",
            )
    return None


def real_path(path: Path) -> Path:
    """`path` with links resolved, as far as they lead: `Path.resolve` raises where they lead in a circle."""
    return Path(os.path.realpath(path))


def _gguf_files(root: Path) -> Iterator[Path]:
    looked_at = 0
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        for entry in _entries(directory):
            looked_at += 1
            if looked_at > MOST_ENTRIES:
                warn_once("model_directory_too_large", root, f"only {MOST_ENTRIES} entries are looked at")
                return
            if entry.is_dir(follow_symlinks=False):  # links to directories may lead in circles
                if depth < DEEPEST:
                    waiting.append((Path(entry.path), depth + 1))
            elif entry.name.endswith(".gguf") and _is_file(entry):
                yield Path(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Regular files and links, also broken ones (they are reported), but no pipes or sockets."""
    try:
        return entry.is_symlink() or stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
    except OSError:  # gone since it was listed
        return False


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            listed = [entry for _, entry in zip(range(MOST_ENTRIES + 1), entries, strict=False)]
    except FileNotFoundError:  # a default directory that nobody made, or one that was just removed
        return []
    except OSError as error:
        warn_once("model_directory_unreadable", directory, error.strerror or str(error))
        return []
    return sorted(listed, key=lambda entry: entry.name)
