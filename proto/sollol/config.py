"""Settings of a daemon: TOML file, then environment, then flags; one frozen checked value and where each part is from.

Entry points hand in argv and the environment; nothing else in the project looks at either.
"""

import difflib
import math
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import inspect
from msgspec.structs import FieldInfo, fields

from sollol import __version__
from sollol.config_text import default, expected, help_text, is_bool, plain_type, render, toml_value
from sollol.errors import Reason, Refusal, SollolError

T = TypeVar("T", bound=msgspec.Struct)
Name = Literal["agent", "head"]
_PROGRAMS = {"agent": "sollol-agent", "head": "sollold"}
_ACTIONS = ("help", "version", "check-config", "print-config")


class ConfigError(SollolError):
    """Raised when a setting is unknown, of the wrong type or out of range; the message says which and where."""

    def __init__(self, message: str) -> None:
        super().__init__(Refusal(reason=Reason.INVALID_REQUEST, message=message))


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """`origins` has an entry for every setting: `default`, `file …`, `environment …` or `flag …`."""

    value: T
    origins: Mapping[str, str]


@dataclass(frozen=True)
class _Given:
    """One setting as one source gives it; environment and flags give text, still to be read."""

    content: Any
    origin: str
    is_text: bool = True


@dataclass(frozen=True)
class _Flags:
    given: dict[str, _Given]
    actions: set[str]
    config_file: Path | None


def load_or_exit(
    kind: type[T], *, name: Name, argv: Sequence[str], environ: Mapping[str, str], default_file: Path
) -> Loaded[T]:
    """Like `load`, for entry points: a ConfigError becomes one line on stderr and exit status 2."""
    try:
        return load(kind, name=name, argv=argv, environ=environ, default_file=default_file)
    except ConfigError as error:
        sys.stderr.write(f"{_PROGRAMS[name]}: {error.refusal.message}\n")
        raise SystemExit(2) from None


def load(
    kind: type[T], *, name: Name, argv: Sequence[str], environ: Mapping[str, str], default_file: Path
) -> Loaded[T]:
    """Read every source and return one checked value.

    `--help`, `--version`, `--check-config` and `--print-config` print and leave by SystemExit(0).

    Raises:
        ConfigError: anything in any source is not as the settings class says, or a file cannot be read. A missing
            `default_file` is no error, a missing `--config FILE` is.
    """
    settings = {info.name: info for info in fields(kind)}
    prefix = f"SOLLOL_{name.upper()}_"
    flags = _read_flags(settings, argv)
    if "help" in flags.actions:
        _leave(help_text(kind, program=_PROGRAMS[name], prefix=prefix, default_file=default_file))
    if "version" in flags.actions:
        _leave(f"{_PROGRAMS[name]} {__version__}")
    path = flags.config_file or (default_file if default_file.exists() else None)
    given = _read_file(settings, path) if path is not None else {}
    given |= _read_environment(settings, prefix, environ)
    given |= flags.given
    loaded = _build(kind, settings, given)
    if "check-config" in flags.actions:
        _leave("ok")
    if "print-config" in flags.actions:
        _leave(render(loaded.value, loaded.origins))
    return loaded


def check_listen(listen: str, insecure: bool) -> None:
    """Refuse an address that other machines can reach, unless a human said `insecure`. `load` calls this.

    Raises:
        ConfigError: `listen` is not a loopback address and `insecure` is false.
    """
    if not insecure and not is_loopback(listen):
        raise ConfigError(
            f'listen = "{listen}" can be reached from other machines, and this version has no TLS yet: anyone there '
            "could use this daemon. Listen on 127.0.0.1, or set insecure = true if you trust that whole network"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than `localhost` count as reachable."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _leave(text: str) -> None:
    sys.stdout.write(text + "\n")
    raise SystemExit(0)


def _read_flags(settings: Mapping[str, FieldInfo], argv: Sequence[str]) -> _Flags:
    given: dict[str, _Given] = {}
    actions: set[str] = set()
    config_file: Path | None = None
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--"):
            raise ConfigError(f'unexpected argument "{word}": settings are given as --setting VALUE, see --help')
        if name in _ACTIONS:
            actions.add(name)
        elif (setting := _negated(settings, name)) and not equals:
            given[setting] = _Given("false", f"flag {flag}")
        elif (info := settings.get(name.replace("-", "_"))) and is_bool(info):
            given[info.name] = _Given(text if equals else "true", f"flag {flag}")
        else:
            if info is None and name != "config":
                raise _unknown(
                    name, f"flag {flag}", [*(item.replace("_", "-") for item in settings), *_ACTIONS, "config"]
                )
            content = text if equals else next(words, None)
            if content is None or (not equals and content.startswith("--")):
                raise ConfigError(f"flag {flag}: needs a value")
            if info is None:
                config_file = Path(content)
            elif info.name in given and _is_many(info):
                given[info.name] = _Given(f"{given[info.name].content},{content}", f"flag {flag}")
            else:
                given[info.name] = _Given(content, f"flag {flag}")
    return _Flags(given, actions, config_file)


def _negated(settings: Mapping[str, FieldInfo], name: str) -> str | None:
    info = settings.get(name.removeprefix("no-").replace("-", "_"))
    return info.name if info is not None and name.startswith("no-") and is_bool(info) else None


def _is_many(info: FieldInfo) -> bool:
    return isinstance(plain_type(info.type), inspect.VarTupleType | inspect.DictType)


def _read_environment(settings: Mapping[str, FieldInfo], prefix: str, environ: Mapping[str, str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in settings or variable != prefix + name.upper():
            raise _unknown(variable, "environment", [prefix + item.upper() for item in settings])
        given[name] = _Given(text, f"environment {variable}")
    return given


def _read_file(settings: Mapping[str, FieldInfo], path: Path) -> dict[str, _Given]:
    try:
        source = path.read_bytes().decode()
        table = tomllib.loads(source)
    except OSError as error:
        raise ConfigError(f"file {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"file {path}: not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"file {path}: not TOML: {error}") from error
    for name in table:
        if name not in settings:
            raise _unknown(name, f"file {path}{_line_of(source, name)}", list(settings))
    return {
        name: _Given(content, f"file {path}{_line_of(source, name)}", is_text=False) for name, content in table.items()
    }


def _line_of(source: str, name: str) -> str:
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[].=]""")
    return next((f" line {number}" for number, line in enumerate(source.splitlines(), 1) if pattern.match(line)), "")


def _unknown(name: str, where: str, known: list[str]) -> ConfigError:
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return ConfigError(f'{where}: unknown setting "{name}"; the closest one is "{closest[0]}"')


def _build(kind: type[T], settings: Mapping[str, FieldInfo], given: Mapping[str, _Given]) -> Loaded[T]:
    contents = {name: _convert(settings[name], item) for name, item in given.items()}
    try:
        value = kind(**contents)
    except ValueError as error:  # a settings class's own __post_init__: rules over several settings
        raise ConfigError(str(error)) from error
    listen = getattr(value, "listen", None)
    if isinstance(listen, str):
        check_listen(listen, bool(getattr(value, "insecure", False)))
    return Loaded(value, {name: given[name].origin if name in given else "default" for name in settings})


def _convert(info: FieldInfo, item: _Given) -> Any:
    content = _split(info, item) if item.is_text and _is_many(info) else item.content
    try:
        found = msgspec.convert(content, info.type, strict=not item.is_text)
    except msgspec.ValidationError as error:
        raise _wrong(info, item) from error
    if isinstance(found, float) and not math.isfinite(found):
        raise _wrong(info, item)
    return found


def _wrong(info: FieldInfo, item: _Given) -> ConfigError:
    got = toml_value(item.content) if isinstance(item.content, str | int | float | list | dict) else str(item.content)
    return ConfigError(
        f"{item.origin}: {info.name} must be {expected(info.type)}, got {got} (default {toml_value(default(info))})"
    )


def _split(info: FieldInfo, item: _Given) -> tuple[str, ...] | dict[str, str]:
    parts = tuple(part.strip() for part in item.content.split(",") if part.strip())
    if isinstance(plain_type(info.type), inspect.VarTupleType):
        return parts
    if wrong := [part for part in parts if "=" not in part]:
        raise ConfigError(f'{item.origin}: {info.name} is a table, write key=value instead of "{wrong[0]}"')
    return {key.strip(): text.strip() for key, _, text in (part.partition("=") for part in parts)}
