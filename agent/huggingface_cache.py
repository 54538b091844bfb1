"""GGUF models in a Hugging Face cache, which llama.cpp's own downloads use too. Only ever read."""

import re
from collections.abc import Iterator
from pathlib import Path

from sollol.gguf_split import split_siblings

from agent.model_files import FoundModel, first_parts, link_problem, model_name, real_path, stem
from agent.told_once import warn_once

MOST_REPOSITORIES = 5_000
_REPOSITORY = "models--"
_QUANTIZATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|FP16|F32|MXFP4\w*|NVFP4))\Z", re.ASCII | re.IGNORECASE
)


def find_in_huggingface(cache: Path) -> Iterator[FoundModel]:
    """Every GGUF of every repository: `org/repo:QUANT`, and by its file stem.

    Of several revisions the one that `refs/main` names wins, then the newest.
    """
    resolved = real_path(cache)
    for directory in _repositories(cache):
        repository = directory.name.removeprefix(_REPOSITORY).replace("--", "/", 1)
        seen: set[Path] = set()
        for snapshot in _snapshots(directory):
            for first in first_parts(snapshot):
                relative = first.relative_to(snapshot)
                if relative in seen:
                    continue
                seen.add(relative)
                yield FoundModel(
                    parts=split_siblings(first),
                    names=_names(repository, relative),
                    source="huggingface",
                    problem=link_problem(split_siblings(first), (resolved,)),
                )


def _names(repository: str, path: Path) -> tuple[str, ...]:
    """`path`: below the snapshot. Some repositories keep each quantization in a directory of its own."""
    file_stem = stem(path)
    tag = _QUANTIZATION.search(file_stem) or _QUANTIZATION.search(path.parent.name)
    names = [f"{repository}:{tag[1].upper()}"] if tag else []
    return tuple(model_name(name) for name in (*names, f"{repository}:{file_stem}", file_stem))


def _repositories(cache: Path) -> list[Path]:
    try:
        found = [path for path in cache.iterdir() if path.name.startswith(_REPOSITORY) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_once("huggingface_cache_unreadable", cache, error.strerror or str(error))
        return []
    if len(found) > MOST_REPOSITORIES:
        warn_once("huggingface_cache_too_large", cache, f"only {MOST_REPOSITORIES} repositories are looked at")
    return sorted(found)[:MOST_REPOSITORIES]


def _snapshots(repository: Path) -> list[Path]:
    """Revisions, the current one first."""
    try:
        snapshots = {path.name: path.stat().st_mtime_ns for path in (repository / "snapshots").iterdir()}
        current = _revision(repository / "refs" / "main")
    except OSError as error:
        warn_once("huggingface_repository_unreadable", repository, error.strerror or str(error))
        return []
    ordered = sorted(snapshots, key=lambda name: (name != current, -snapshots[name], name))
    return [repository / "snapshots" / name for name in ordered]


def _revision(reference: Path) -> str:
    if not reference.is_file():  # an interrupted download has none
        return ""
    try:
        with reference.open("rb") as file:
            return file.read(100).decode(errors="replace").strip()
    except OSError:  # gone, or not ours to read: every revision is then as good as another
        return ""
