"""One setting as one source gives it: converted to its type, or refused with where it stands and what was expected."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect
from msgspec.structs import FieldInfo, fields

from sollol.config_text import default, expected, options_of, plain_type, toml_value
from sollol.errors import Reason, Refusal, SollolError


class ConfigError(SollolError):
    """Raised when a setting is unknown, of the wrong type or out of range; the message says which and where."""

    def __init__(self, message: str) -> None:
        super().__init__(Refusal(reason=Reason.INVALID_REQUEST, message=message))


@dataclass(frozen=True)
class Given:
    """Environment and flags give text, still to be read; `lines` are those of the file it is from."""

    content: Any
    origin: str
    is_text: bool = True
    lines: Sequence[str] = ()


def unknown(name: str, where: str, known: Sequence[str]) -> ConfigError:
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return ConfigError(f'{where}: unknown setting "{name}"; the closest one is "{closest[0]}"')


def is_many(info: FieldInfo) -> bool:
    return isinstance(plain_type(info.type), inspect.VarTupleType | inspect.DictType)


def line_of(lines: Sequence[str], name: str, after: int = 0) -> int | None:
    """The number of the first line behind line `after` that sets `name` or opens its table."""
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[].=]""")
    return next((at for at, line in enumerate(lines[after:], after + 1) if pattern.match(line)), None)


def convert(info: FieldInfo, item: Given) -> Any:
    """Return what the setting's type makes of it.

    Raises:
        ConfigError: it is not of that type.
    """
    options = options_of(info.type)
    if options is not None:
        return _tables(info, options, item)
    content = _split(info, item) if item.is_text and is_many(info) else item.content
    try:
        found = msgspec.convert(content, info.type, strict=not item.is_text)
    except msgspec.ValidationError as error:
        raise _wrong(info, item) from error
    if isinstance(found, float) and not math.isfinite(found):
        raise _wrong(info, item)
    return found


def _tables(info: FieldInfo, options: type[msgspec.Struct], item: Given) -> dict[str, msgspec.Struct]:
    """Tables of options by name; every option is checked, and complained about, like a setting of its own."""
    content = item.content
    if item.is_text or not (
        isinstance(content, Mapping) and all(isinstance(each, Mapping) for each in content.values())
    ):
        raise ConfigError(f'{item.origin}: {info.name} are tables such as [{info.name}."NAME"], and in a file only')
    return {name: _table(info.name, name, options, item) for name in content}


def _table(setting: str, name: str, options: type[msgspec.Struct], item: Given) -> msgspec.Struct:
    known = {option.name: option for option in fields(options)}
    contents: dict[str, Any] = {}
    for option, content in item.content[name].items():
        origin = _origin(item, setting, name, option)
        if option not in known:
            raise unknown(option, origin, list(known))
        contents[option] = convert(known[option], Given(content, origin, is_text=False))
    return options(**contents)


def _origin(item: Given, setting: str, name: str, option: str) -> str:
    """Where an option stands, as exactly as a look at the lines tells."""
    header = re.compile(rf"""\s*\[\s*{setting}\s*\.\s*["']?{re.escape(name)}["']?\s*\]""")
    line = next((at for at, line in enumerate(item.lines, 1) if header.match(line)), None)
    if line is not None:
        line = line_of(item.lines, option, after=line)
    origin = item.origin if line is None else re.sub(r" line \d+$", f" line {line}", item.origin)
    return f"{origin}, [{setting}.{toml_value(name)}]"


def _wrong(info: FieldInfo, item: Given) -> ConfigError:
    got = toml_value(item.content) if isinstance(item.content, str | int | float | list | dict) else str(item.content)
    usual = default(info)
    otherwise = "" if usual is None else f" (default {toml_value(usual)})"
    return ConfigError(f"{item.origin}: {info.name} must be {expected(info.type)}, got {got}{otherwise}")


def _split(info: FieldInfo, item: Given) -> tuple[str, ...] | dict[str, str]:
    parts = tuple(part.strip() for part in item.content.split(",") if part.strip())
    if isinstance(plain_type(info.type), inspect.VarTupleType):
        return parts
    if wrong := [part for part in parts if "=" not in part]:
        raise ConfigError(f'{item.origin}: {info.name} is a table, write key=value instead of "{wrong[0]}"')
    return {key.strip(): text.strip() for key, _, text in (part.partition("=") for part in parts)}
