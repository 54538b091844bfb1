"""Models in one or several GGUF files: finds the parts, reads their headers, checks that they belong together."""

import re
from collections.abc import Sequence
from pathlib import Path

from sollol.errors import Reason, refuse
from sollol.gguf import Header, Value, read_header
from sollol.names import quoted

MOST_PARTS = 1_000
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


def split_siblings(path: Path) -> tuple[Path, ...]:
    """All parts of the model that `path` belongs to, the first one first; `path` alone when it is not split.

    By name only (`stem-00001-of-00003.gguf`): whether the others exist shows when they are read.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    number, count = int(part["number"]), int(part["count"])
    if not 1 <= number <= count <= MOST_PARTS:
        return (path,)
    return tuple(path.with_name(f"{part['stem']}-{at:05d}-of-{count:05d}.gguf") for at in range(1, count + 1))


def read_model(paths: Sequence[Path]) -> tuple[Header, ...]:
    """Read every part of a model, the first one first, and check that they belong together.

    Raises:
        SollolError: as `read_header`; MODEL_CORRUPT when a part is missing, misplaced or of another model.
    """
    headers = []
    for number, path in enumerate(paths, start=1):
        if len(paths) > 1 and not path.exists():
            raise refuse(
                Reason.MODEL_CORRUPT,
                f"part {number} of {len(paths)} is missing: put {quoted(path.name)} beside the others",
                numbers={"part": number, "parts": len(paths)},
            )
        header = read_header(path)
        _check_part(header, number, len(paths))
        headers.append(header)
    _check_tensors_of_parts(headers)
    return tuple(headers)


def _check_part(header: Header, number: int, count: int) -> None:
    claimed_count = header.metadata.get("split.count", 1)
    claimed_number = header.metadata.get("split.no", number - 1)
    if (claimed_count or 1, claimed_number) != (count, number - 1):
        raise refuse(
            Reason.MODEL_CORRUPT,
            f"{quoted(header.name)} was found as part {number} of {count}, but says it is part "
            f"{_plus_one(claimed_number)} of {claimed_count}; give the parts the names they had",
        )


def _plus_one(number: Value) -> Value:
    return number + 1 if isinstance(number, int) else number


def _check_tensors_of_parts(headers: Sequence[Header]) -> None:
    if len(headers) == 1:
        return
    names = [tensor.name for header in headers for tensor in header.tensors]
    claimed = headers[0].metadata.get("split.tensors.count", len(names))
    if claimed != len(names) or len(set(names)) != len(names):
        raise refuse(
            Reason.MODEL_CORRUPT,
            f"the {len(headers)} parts beginning with {quoted(headers[0].name)} hold {len(names)} tensors, "
            f"{len(set(names))} different ones, but {claimed} belong to the model; download all parts again",
        )
