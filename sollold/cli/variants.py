"""What follows `--what-if`: words such as `context=32768 parallel=4`, each set of them one variant of a wish."""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace
from sollol.errors import Reason, SollolError, refuse
from sollol.names import closest
from sollol.report import PlacementWish

AS_ASKED = "as asked"
_MOST_DIGITS = 9


def whole(text: str) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise ValueError("is not a whole number, or too large a one")
    return int(text)


# What may vary: the field of the wish, and how its value is read.
KNOBS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "context": ("context_per_slot", whole),
    "parallel": ("parallel", whole),
    "kv": ("kv_type", str),
    "policy": ("policy", str),
    "strategy": ("strategy", str),
    "max_nodes": ("max_nodes", whole),
    "backends": ("backends_per_pool", whole),
    "pin": ("pinned_node", str),
}


def variants(wish: PlacementWish, sets: Sequence[Sequence[str]]) -> list[tuple[str, PlacementWish]]:
    """The wish itself, then each variant of it, by name.

    Raises:
        SollolError: INVALID_REQUEST, naming the word that cannot be read.
    """
    return [(AS_ASKED, wish), *((" ".join(words), _varied(wish, words)) for words in sets)]


def _varied(wish: PlacementWish, words: Sequence[str]) -> PlacementWish:
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        knob = KNOBS.get(name.replace("-", "_"))
        if knob is None or not equals or not text:
            raise _invalid(word, _hint(name) if knob is None else f"write {name}=VALUE")
        field, read = knob
        if field in changes:
            raise _invalid(word, f"{name} is set twice; repeat --what-if for another variant")
        try:
            changes[field] = read(text)
        except ValueError as error:
            raise _invalid(word, f"{text} {error}") from error
    return replace(wish, **changes)


def _hint(name: str) -> str:
    near = closest(name, KNOBS)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}what can vary: {', '.join(KNOBS)}"


def _invalid(word: str, why: str) -> SollolError:
    return refuse(Reason.INVALID_REQUEST, f"--what-if {word}: {why}")
