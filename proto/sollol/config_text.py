"""Settings as text: what a type expects, a value in TOML, `--help` and `--print-config`. Passwords are masked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect
from msgspec.structs import FieldInfo, fields

from sollol.redaction import redact


def plain_type(kind: Any) -> inspect.Type:
    """The type behind `Annotated[..., Meta(description=...)]`."""
    return _plain(inspect.type_info(kind))


def _plain(info: inspect.Type) -> inspect.Type:
    return info.type if isinstance(info, inspect.Metadata) else info


def options_of(kind: Any) -> type[msgspec.Struct] | None:
    """The options in each table of a setting that is a table of tables; None for any other setting."""
    plain = plain_type(kind)
    inner = _plain(plain.value_type) if isinstance(plain, inspect.DictType) else None
    return inner.cls if isinstance(inner, inspect.StructType) else None


def description(kind: Any) -> str:
    """The `Meta(description=...)` of a setting's type, empty when it has none."""
    info = inspect.type_info(kind)
    schema = info.extra_json_schema if isinstance(info, inspect.Metadata) else None
    return str((schema or {}).get("description", ""))


def expected(kind: Any) -> str:
    """A setting's type in a few words, with its range or choices: `int from 1 to 65535`, `fit|classic`."""
    return _expected(plain_type(kind))


def _expected(info: inspect.Type) -> str:
    match info:
        case inspect.BoolType():
            text = "true|false"
        case inspect.IntType():
            text = "int" + _range(info)
        case inspect.FloatType():
            text = "number" + _range(info)
        case inspect.UnionType():  # of a type and None, for what need not be set
            text = _expected(next(_plain(each) for each in info.types if not isinstance(each, inspect.NoneType)))
        case inspect.VarTupleType():
            text = f"list of {_expected(info.item_type)}"
        case inspect.DictType():
            text = f"table of {_expected(info.value_type)}"
        case inspect.StrType(pattern=str(pattern)):
            text = pattern.removeprefix("^(").removesuffix(")$")
        case inspect.StrType(min_length=int()):
            text = "text, not empty"
        case _:
            text = "text"
    return text


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {info.ge} to {info.le}"
    if info.ge is not None:
        return f" of {info.ge:g} or more"
    if info.gt is not None:
        return f" above {info.gt:g}"
    return ""


def toml_value(content: Any) -> str:
    """One setting's value in TOML. Options that are not set are left out."""
    if isinstance(content, msgspec.Struct):
        content = {
            name: said for name in content.__struct_fields__ if (said := getattr(content, name)) not in (None, ())
        }
    if isinstance(content, Mapping):
        pairs = ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in content.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(content, tuple | list):
        return "[" + ", ".join(toml_value(item) for item in content) + "]"
    return msgspec.json.encode(redact(content) if isinstance(content, str) else content).decode()


def render(value: msgspec.Struct, origins: Mapping[str, str]) -> str:
    """What `--print-config` prints: valid TOML, each setting's origin as a comment."""
    return "\n".join(
        f"{info.name} = {toml_value(getattr(value, info.name))}  # {origins[info.name]}" for info in fields(value)
    )


def help_text(kind: type[msgspec.Struct], *, program: str, prefix: str, default_file: Path) -> str:
    """What `--help` prints: every setting with its type, default and description."""
    lines = [
        f"usage: {program} [--config FILE] [--SETTING VALUE ...]",
        "",
        f"Settings come from {default_file}, then the environment ({prefix}SETTING), then flags.",
        "Lists: repeat the flag, or separate by commas. Tables: key=value.",
        "",
        "  --config FILE     read this file instead",
        "  --check-config    check every setting, print ok or what is wrong, and leave",
        "  --print-config    print every setting with its origin, and leave",
        "  --version, --help",
        "",
    ]
    for info in fields(kind):
        options = options_of(info.type)
        if options is not None:
            lines.extend(_tables_text(info, options))
            continue
        flag = info.name.replace("_", "-")
        shown = f"--[no-]{flag}" if is_bool(info) else f"--{flag} ({expected(info.type)})"
        lines.append(f"  {shown}, default {toml_value(default(info))}")
        if text := description(info.type):
            lines.append(f"        {text}")
    return "\n".join(lines)


def _tables_text(info: FieldInfo, options: type[msgspec.Struct]) -> list[str]:
    return [
        f'  [{info.name}."NAME"], in the file only',
        f"        {description(info.type)}:",
        *(f"        {option.name} ({expected(option.type)}): {description(option.type)}" for option in fields(options)),
    ]


def is_bool(info: FieldInfo) -> bool:
    return isinstance(plain_type(info.type), inspect.BoolType)


def default(info: FieldInfo) -> Any:
    """The value a setting has when no source names it."""
    return info.default_factory() if info.default_factory is not msgspec.NODEFAULT else info.default
