"""Settings of a daemon: TOML file, then environment, then flags; one frozen checked value and where each part is from.

Entry points hand in argv and the environment; nothing else in the project looks at either.
"""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec.structs import FieldInfo, fields

from sollol import __version__
from sollol.config_text import help_text, is_bool, render
from sollol.config_values import ConfigError, Given, convert, is_many, line_of, unknown
from sollol.identity import Role
from sollol.pki_directories import tls_directory

__all__ = ["ConfigError", "Loaded", "check_listen", "is_loopback", "load", "load_or_exit"]

T = TypeVar("T", bound=msgspec.Struct)
Name = Literal["agent", "head"]
_PROGRAMS = {"agent": "sollol-agent", "head": "sollold"}
_ACTIONS = ("help", "version", "check-config", "print-config")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """`origins` has an entry for every setting: `default`, `file …`, `environment …` or `flag …`."""

    value: T
    origins: Mapping[str, str]


@dataclass(frozen=True)
class _Flags:
    given: dict[str, Given]
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
    _check_reach(loaded.value, Role(name), environ)
    if "check-config" in flags.actions:
        _leave("ok")
    if "print-config" in flags.actions:
        _leave(render(loaded.value, loaded.origins))
    return loaded


def check_listen(listen: str, insecure: bool, *, tls: bool = False) -> None:
    """Refuse an address that other machines can reach, unless with TLS or a human said `insecure`. `load` calls this.

    Raises:
        ConfigError: `listen` is not a loopback address, there is no TLS, and `insecure` is false.
    """
    if not (insecure or tls or is_loopback(listen)):
        raise ConfigError(
            f'listen = "{listen}" can be reached from other machines, and there is no TLS: anyone there could use this '
            "daemon. `sollol join` or `sollol pki issue` gives it a certificate (tls_dir); or listen on 127.0.0.1, or "
            "set insecure = true if you trust that whole network"
        )


def _check_reach(value: msgspec.Struct, role: Role, environ: Mapping[str, str]) -> None:
    listen, tls_dir = getattr(value, "listen", None), getattr(value, "tls_dir", None)
    if isinstance(listen, str):
        tls = isinstance(tls_dir, str) and tls_directory(tls_dir, role, environ) is not None
        check_listen(listen, bool(getattr(value, "insecure", False)), tls=tls)


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
    given: dict[str, Given] = {}
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
            given[setting] = Given("false", f"flag {flag}")
        elif (info := settings.get(name.replace("-", "_"))) and is_bool(info):
            given[info.name] = Given(text if equals else "true", f"flag {flag}")
        else:
            if info is None and name != "config":
                raise unknown(
                    name, f"flag {flag}", [*(item.replace("_", "-") for item in settings), *_ACTIONS, "config"]
                )
            content = text if equals else next(words, None)
            if content is None or (not equals and content.startswith("--")):
                raise ConfigError(f"flag {flag}: needs a value")
            if info is None:
                config_file = Path(content)
            elif info.name in given and is_many(info):
                given[info.name] = Given(f"{given[info.name].content},{content}", f"flag {flag}")
            else:
                given[info.name] = Given(content, f"flag {flag}")
    return _Flags(given, actions, config_file)


def _negated(settings: Mapping[str, FieldInfo], name: str) -> str | None:
    info = settings.get(name.removeprefix("no-").replace("-", "_"))
    return info.name if info is not None and name.startswith("no-") and is_bool(info) else None


def _read_environment(settings: Mapping[str, FieldInfo], prefix: str, environ: Mapping[str, str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in settings or variable != prefix + name.upper():
            raise unknown(variable, "environment", [prefix + item.upper() for item in settings])
        given[name] = Given(text, f"environment {variable}")
    return given


def _read_file(settings: Mapping[str, FieldInfo], path: Path) -> dict[str, Given]:
    try:
        source = path.read_bytes().decode()
        table = tomllib.loads(source)
    except OSError as error:
        raise ConfigError(f"file {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"file {path}: not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"file {path}: not TOML: {error}") from error
    lines = source.splitlines()
    given: dict[str, Given] = {}
    for name, content in table.items():
        line = line_of(lines, name)
        origin = f"file {path}" if line is None else f"file {path} line {line}"
        if name not in settings:
            raise unknown(name, origin, list(settings))
        given[name] = Given(content, origin, is_text=False, lines=lines)
    return given


def _build(kind: type[T], settings: Mapping[str, FieldInfo], given: Mapping[str, Given]) -> Loaded[T]:
    contents = {name: convert(settings[name], item) for name, item in given.items()}
    try:
        value = kind(**contents)
    except ValueError as error:  # a settings class's own __post_init__: rules over several settings
        raise ConfigError(str(error)) from error
    return Loaded(value, {name: given[name].origin if name in given else "default" for name in settings})
