"""Turns contract values into `sollol.v1` messages and back, by field name.

Only gRPC edges import this: `_pb2` types go no further. A value's fields and its message's fields have equal names
(a test walks both), so there is one rule for all of them and nothing to forget when a field is added.
"""

from enum import StrEnum
from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message

T = TypeVar("T", bound=msgspec.Struct)
M = TypeVar("M", bound=Message)
# Descriptors have one class per protobuf implementation (C or Python) and no common base that type checkers know.
FieldDescriptor = Any


def fill(message: M, value: msgspec.Struct) -> M:
    """Copy every set field of `value` into `message` and return it. None and empty fields stay unset."""
    descriptor = message.DESCRIPTOR
    for name in value.__struct_fields__:
        content = getattr(value, name)
        if content is None:
            continue
        _fill_field(message, descriptor.fields_by_name[name], content)
    return message


def _fill_field(message: Message, field: FieldDescriptor, content: Any) -> None:
    if isinstance(content, msgspec.Struct):
        target = getattr(message, field.name)
        target.SetInParent()
        fill(target, content)
    elif isinstance(content, StrEnum):
        setattr(message, field.name, _enum_number(field, content))
    elif isinstance(content, dict):
        getattr(message, field.name).update(content)
    elif isinstance(content, tuple):
        target = getattr(message, field.name)
        if field.message_type is not None:
            for item in content:
                fill(target.add(), item)
        else:
            target.extend(content)
    else:
        setattr(message, field.name, content)


def _enum_number(field: FieldDescriptor, content: StrEnum) -> int:
    enum = field.enum_type
    assert enum is not None
    return int(enum.values_by_name[_enum_prefix(enum.values[0].name) + content.name].number)


def _enum_prefix(zero_name: str) -> str:
    return zero_name.removesuffix("UNSPECIFIED")


def value(kind: type[T], message: Message) -> T:
    """Read a contract value out of `message`.

    Raises:
        msgspec.ValidationError: a field holds what the value's type does not allow, such as an enum number of a
            newer peer.
    """
    return msgspec.convert(_builtins(message), kind)


def _builtins(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        content = getattr(message, field.name)
        if _is_map(field):
            found[field.name] = dict(content)
        elif field.is_repeated:
            found[field.name] = [_scalar(field, item) for item in content]
        else:
            found[field.name] = _scalar(field, content)
    return found


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _scalar(field: FieldDescriptor, content: Any) -> Any:
    if field.message_type is not None:
        return _builtins(content)
    if field.enum_type is not None:
        number = field.enum_type.values_by_number.get(content)
        prefix = _enum_prefix(field.enum_type.values[0].name)
        return number.name.removeprefix(prefix) if number is not None else str(content)
    return content
