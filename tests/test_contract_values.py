"""The contract's values, its messages and its vocabulary say the same."""

import inspect
import math
from enum import StrEnum

import grpc
import msgspec
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect as types
from sollol import correction, engine, errors, inference, link, report, wire
from sollol.access import ACCESS
from sollol.errors import SURFACES, Reason, Refusal, Retry, SollolError, refuse
from sollol.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2

from agent.supervisor.owner import Limits
from sollold.agent_link import BACKEND_TIMEOUT_S, UNARY_TIMEOUT_S

MESSAGES = {
    name: getattr(module, name)
    for module in (common_pb2, cluster_pb2, agent_pb2, inference_pb2)
    for name in module.DESCRIPTOR.message_types_by_name
}
CONTRACT = (report, inference, link, engine, correction, errors)
VALUES = [
    kind
    for module in CONTRACT
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
]
ENUMS = [
    kind
    for module in CONTRACT
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, StrEnum) and kind.__module__ == module.__name__
]
WHOLE_NUMBERS = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**63 - 1),
}


def text() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=8)


def contents(kind: types.Type, field) -> st.SearchStrategy:  # noqa: C901, PLR0911 - one per kind of type
    """Values of `kind` that its protobuf field can hold: a whole number's range is the field's."""
    match kind:
        case types.StructType():
            return values(kind.cls)
        case types.EnumType():
            return st.sampled_from(kind.cls)
        case types.BoolType():
            return st.booleans()
        case types.IntType():
            name = next(name for name in WHOLE_NUMBERS if getattr(field, f"TYPE_{name.upper()}") == field.type)
            return st.integers(*WHOLE_NUMBERS[name])
        case types.FloatType():
            return st.floats(allow_nan=False)
        case types.StrType():
            return text()
        case types.BytesType():
            return st.binary(max_size=40)
        case types.VarTupleType():
            return st.lists(contents(kind.item_type, field), max_size=3).map(tuple)
        case types.DictType():
            item = field.message_type.fields_by_name["value"]
            return st.dictionaries(text(), contents(kind.value_type, item), max_size=3)
        case types.UnionType():
            (some,) = [item for item in kind.types if not isinstance(item, types.NoneType)]
            return st.none() | contents(some, field)
        case _:
            raise AssertionError(f"no strategy for {kind}")


def values(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    fields = MESSAGES[kind.__name__].DESCRIPTOR.fields_by_name
    info = types.type_info(kind)
    chosen = {item.name: contents(item.type, fields[item.name]) for item in info.fields}
    return st.fixed_dictionaries(chosen).map(lambda given_fields: kind(**given_fields))


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_every_enum_has_the_names_of_its_proto(kind):
    proto = descriptor_pool.Default().FindEnumTypeByName(f"sollol.v1.{kind.__name__}")
    zero, *names = [value.name for value in proto.values]
    prefix = zero.removesuffix("UNSPECIFIED")
    assert zero.endswith("_UNSPECIFIED")
    assert [name.removeprefix(prefix) for name in names] == [member.name for member in kind]


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_has_the_fields_of_its_message(kind):
    assert sorted(kind.__struct_fields__) == sorted(MESSAGES[kind.__name__].DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_comes_back_from_the_wire_as_it_went(kind):
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values(kind))
    def comes_back(value):
        sent = wire.fill(MESSAGES[kind.__name__](), value).SerializeToString()
        assert wire.value(kind, MESSAGES[kind.__name__].FromString(sent)) == value

    comes_back()


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_is_frozen(kind):
    assert kind.__struct_config__.frozen


def test_an_enum_number_of_a_newer_peer_is_a_validation_error_and_not_a_crash():
    message = common_pb2.Refusal(reason=9999, message="from the future")
    with pytest.raises(msgspec.ValidationError):
        wire.value(Refusal, message)


def test_every_reason_shows_on_every_surface():
    assert list(SURFACES) == list(Reason)
    for reason, surface in SURFACES.items():
        assert 400 <= surface.http_status < 600, reason
        assert surface.grpc_status in grpc.StatusCode.__members__, reason
        assert surface.grpc_status != "OK", reason
        assert 1 <= surface.exit_code < 256, reason
        assert surface.openai_type, reason


def test_refuse_builds_an_error_that_carries_the_whole_refusal():
    error = refuse(Reason.NO_FIT, "too big", retryable=True, numbers={"needed_bytes": 5}, retry_after_s=1.5)
    assert isinstance(error, SollolError)
    assert str(error) == "NO_FIT: too big"
    assert error.refusal == Refusal(
        reason=Reason.NO_FIT,
        message="too big",
        retry=Retry.RETRYABLE,
        numbers={"needed_bytes": 5},
        retry_after_s=1.5,
    )
    assert math.isclose(error.refusal.retry_after_s or 0, 1.5)


def test_every_method_of_every_service_says_who_may_call_it():
    modules = (agent_pb2, cluster_pb2, inference_pb2, health_pb2)
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods - set(ACCESS) == set()
    assert {method for method in set(ACCESS) - methods if method.startswith("/sollol.")} == set()
    assert all(ACCESS.values())


def test_a_head_waits_for_a_backend_longer_than_its_agent_does_who_knows_why_it_does_not_come():
    backend_and_forwarder_s = 2 * Limits().connect_timeout_s
    assert backend_and_forwarder_s + UNARY_TIMEOUT_S < BACKEND_TIMEOUT_S
