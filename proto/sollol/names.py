"""Model names as users write them: which are allowed, which are close, and what they say of a model's size."""

import difflib
import re
from collections.abc import Iterable

from sollol.errors import Reason, refuse

LONGEST_NAME = 200
_QUOTED_CHARACTERS = 40
_ALLOWED = re.compile(r"[A-Za-z0-9._:/@+-]+\Z")
_BILLIONS = re.compile(r"(\d+)b", re.ASCII)
_LEAST_LIKENESS = 0.4  # of difflib's ratio: below it a suggestion looks like a joke
_MOST_COMPARED = 10_000  # bounds the work that one wrong name can cause


def check_model_name(name: str) -> None:
    """Accept what a model can be called.

    A name is looked up, never turned into a path. The grammar keeps odd ones out of logs, URLs, metrics and keys too.

    Raises:
        SollolError: INVALID_MODEL_NAME, quoting at most 40 characters of the name.
    """
    problem = _problem(name)
    if problem:
        raise refuse(Reason.INVALID_MODEL_NAME, f"the model name {quoted(name)} {problem}; `sollol models` lists names")


def _problem(name: str) -> str | None:
    if not name:
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, more than {LONGEST_NAME}"
    if not _ALLOWED.match(name):
        return "has characters other than A-Z a-z 0-9 . _ : / @ + -"
    if ".." in name:
        return "contains '..'"
    if name[0] in "/-":
        return f"starts with '{name[0]}'"
    return None


def quoted(name: str) -> str:
    """`name` in ASCII quotes, control characters escaped, cut after 40 characters: fit for messages and logs."""
    escaped = ascii(name[:_QUOTED_CHARACTERS])
    cut = len(name) > _QUOTED_CHARACTERS or len(escaped) > _QUOTED_CHARACTERS + 2
    return f"{escaped[: _QUOTED_CHARACTERS + 1].rstrip(escaped[0])}…{escaped[0]}" if cut else escaped


def closest(name: str, known: Iterable[str], limit: int = 3) -> tuple[str, ...]:
    """Up to `limit` of the `known` names that a person may have meant by `name`, likeliest first."""
    by_folded: dict[str, str] = {}
    for candidate in sorted(known)[:_MOST_COMPARED]:
        by_folded.setdefault(candidate.casefold(), candidate)
    asked = name[:LONGEST_NAME].casefold()
    near = difflib.get_close_matches(asked, by_folded, n=limit, cutoff=_LEAST_LIKENESS)
    return tuple(by_folded[folded] for folded in near)


def billions_in(name: str) -> int | None:
    """The parameters, in billions, that a name claims: the first `<digits>b`, as in `llama3.1:70b`. None without one.

    Digits right before the b only, so `1.5b` says 5: the seed's estimate, kept exactly.
    """
    found = _BILLIONS.search(name[:LONGEST_NAME].lower())
    return int(found.group(1)) if found else None
