import pytest
from msgspec.structs import replace
from sollol.errors import Reason, Refusal
from sollol.report import Device, DeviceKind, DeviceShare, Instance, InstanceKind, InstanceState, Report

from agent.presence.events import events_between
from agent.presence.state import node_state, pool_states

READY = Instance(
    instance_id="p",
    model="m",
    state=InstanceState.READY,
    parallel=4,
    active_streams=1,
    pool_number=2,
    observed_ms_per_token=20.0,
    shares=(
        DeviceShare(device_id="CPU", layers=1, total_bytes=3),
        DeviceShare(device_id="CUDA0", layers=1, total_bytes=4),
    ),
)
STARTING = replace(READY, state=InstanceState.STARTING, observed_ms_per_token=0.0)
LOST = replace(READY, state=InstanceState.LOST, refusal=Refusal(reason=Reason.ENGINE_DIED, message="it died"))
BACKEND = replace(READY, instance_id="b", kind=InstanceKind.BACKEND)


def report(*instances):
    devices = (
        Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=100, free_bytes=40, reserved_bytes=7),
        Device(device_id="CUDA0", kind=DeviceKind.GPU, total_bytes=50, free_bytes=20),
    )
    return Report(node_id="a", host="h", port=1, devices=devices, instances=instances, measured_unix_s=5.0)


def pools(*instances):
    return {pool.pool_id: pool for pool in pool_states(report(*instances))}


def told(before, now):
    return [(event.event, event.pool_id) for event in events_between(before, now.values(), 5.0)]


def test_a_node_says_its_bytes_load_and_speed():
    state = node_state(report(READY), pool_states(report(READY, replace(READY, instance_id="q"))))
    assert (state.total_bytes, state.free_bytes, state.reserved_bytes) == (150, 60, 7)
    assert [(device.device_id, device.free_bytes) for device in state.devices] == [("CPU", 40), ("CUDA0", 20)]
    assert (state.pools_ready, state.active_streams, state.tokens_per_s) == (2, 2, 100.0)


def test_a_speed_that_nobody_observed_is_not_said():
    slow = replace(READY, observed_ms_per_token=0.0)
    (pool,) = pool_states(report(slow))
    assert pool.tokens_per_s is None
    assert node_state(report(slow), [pool]).tokens_per_s is None


def test_a_pool_says_its_bytes_load_and_speed():
    (pool,) = pool_states(report(READY, BACKEND, replace(READY, instance_id="s", state=InstanceState.STOPPED)))
    assert (pool.pool_id, pool.number, pool.bytes, pool.load, pool.tokens_per_s) == ("p", 2, 7, 0.25, 50.0)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((), (STARTING,), ["start"]),
        ((STARTING,), (READY,), ["ready"]),
        ((), (READY,), ["start", "ready"]),
        ((READY,), (replace(READY, active_streams=3),), []),
        ((READY,), (LOST,), ["lost"]),
        ((STARTING,), (replace(LOST, state=InstanceState.FAILED),), ["lost"]),
        ((LOST,), (replace(LOST, state=InstanceState.BACKOFF),), []),
        ((LOST,), (), []),
        ((READY,), (replace(READY, state=InstanceState.STOPPING),), []),
        ((READY,), (replace(READY, state=InstanceState.STOPPED),), ["stopped"]),
        ((READY,), (), ["stopped"]),
        ((), (BACKEND,), []),
    ],
)
def test_what_happened_between_two_reports(before, now, expected):
    assert told(pools(*before), pools(*now)) == [(name, "p") for name in expected]


def test_what_was_lost_says_why():
    (event,) = events_between(pools(READY), pools(LOST).values(), 5.0)
    assert (event.reason, event.message, event.unix_s) == ("ENGINE_DIED", "it died", 5.0)
