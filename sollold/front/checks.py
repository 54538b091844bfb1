"""Checks of single values in a request: each takes the value's path and the value, and returns what is forwarded.

Pure. What does not pass raises BadParameterError, whose message starts with the path: "temperature: expected ...".
"""

from collections.abc import Callable, Mapping
from typing import Any

from sollol.errors import Reason, Refusal, SollolError

Check = Callable[[str, Any], Any]

_SHOWN_CHARACTERS = 60


class BadParameterError(SollolError):
    """INVALID_REQUEST because of one parameter; `param` is its path, such as `messages[2].content`."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(Refusal(reason=Reason.INVALID_REQUEST, message=f"{param}: {problem}"))
        self.param = param


def expected(param: str, what: str, got: Any) -> BadParameterError:
    """Build the error for a value that is not `what`; a long value is cut."""
    shown = type(got).__name__ if isinstance(got, dict | list) else repr(got)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}..."
    names = {"dict": "an object", "list": "a list", "None": "null", "True": "true", "False": "false"}
    return BadParameterError(param, f"expected {what}, got {names.get(shown, shown)}")


def number(low: float, high: float) -> Check:
    def check(param: str, value: Any) -> float:
        what = f"a number between {low:g} and {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise expected(param, what, value)
        if not low <= value <= high:  # NaN is not between anything
            raise expected(param, what, value)
        return value

    return check


def integer(low: int, high: int) -> Check:
    def check(param: str, value: Any) -> int:
        what = f"a whole number between {low} and {high}"
        if isinstance(value, float) and value.is_integer():  # some clients write 64.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise expected(param, what, value)
        return value

    return check


def boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise expected(param, "true or false", value)
    return value


def text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise expected(param, "a string", value)
    return value


def one_of(*choices: str) -> Check:
    def check(param: str, value: Any) -> str:
        if value not in choices:
            raise expected(param, " or ".join(repr(item) for item in choices), value)
        return str(value)

    return check


def mapping(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise expected(param, "an object", value)
    return value


def sequence(low: int, high: int, item: Check) -> Check:
    """Check a list of `low` to `high` items, each of which passes `item`."""

    def check(param: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise expected(param, "a list", value)
        if not low <= len(value) <= high:
            raise BadParameterError(param, f"expected {low} to {high} items, got {len(value)}")
        return [item(f"{param}[{index}]", entry) for index, entry in enumerate(value)]

    return check


def required(param: str, container: dict[str, Any], name: str, check: Check) -> Any:
    """Check a field that must be there; `param` is the container's path, empty for the whole request."""
    path = f"{param}.{name}" if param else name
    if container.get(name) is None:
        raise BadParameterError(path, "is missing")
    return check(path, container[name])


def fields(param: str, container: dict[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Check the known fields; what is null or not in `checks` is left out."""
    prefix = f"{param}." if param else ""
    return {
        name: check(prefix + name, container[name]) for name, check in checks.items() if container.get(name) is not None
    }
