import asyncio
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
from redis import Redis
from sollol.errors import Reason, Refusal
from sollol.registry import Registry, RegistryUnavailable, agent_key, node_key
from sollol.report import Device, DeviceKind, Model, Report

from tests.notice_board import events, reports
from tests.redis_fixture import redis_command, wait_for_redis
from tests.waiting import wait_until

GIB = 1 << 30
CPU = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=16 * GIB, free_bytes=10 * GIB)
CUDA = Device(device_id="CUDA0", kind=DeviceKind.GPU, name="RTX 3090", total_bytes=24 * GIB, free_bytes=20 * GIB)

pytestmark = pytest.mark.usefixtures("every_key_has_a_lease")


def report(node_id: str = "laptop", devices: tuple[Device, ...] = (CPU,), **more) -> Report:
    return Report(**{"node_id": node_id, "host": "192.168.1.20", "port": 7462, "devices": devices, **more})


@pytest.fixture
async def registry(clean_redis: str):
    registry = Registry(clean_redis, client_name="sollol-test")
    yield registry
    await registry.close()


@pytest.fixture
def redis(clean_redis: str):
    with Redis.from_url(clean_redis) as client:
        yield client


async def test_a_published_report_is_read_back_whole(registry: Registry, clean_redis: str):
    problem = Refusal(reason=Reason.MODEL_CORRUPT, message="truncated", numbers={"size_bytes": 3})
    sent = report(
        devices=(CPU, CUDA),
        labels={"rack": "attic"},
        models=(Model(name="a", size_bytes=1, identity="x", problem=problem),),
    )
    await registry.publish(sent, lease_s=5)
    assert reports(clean_redis) == (sent,)


async def test_reports_are_ordered_by_node_id_and_the_newest_wins(registry: Registry, clean_redis: str):
    for node_id, sequence in (("b", 1), ("a", 1), ("b", 2)):
        await registry.publish(report(node_id, sequence=sequence), lease_s=5)
    assert [(found.node_id, found.sequence) for found in reports(clean_redis)] == [("a", 1), ("b", 2)]


async def test_the_seed_finds_its_fields_and_only_those(registry: Registry, redis: Redis):
    unified = msgspec.structs.replace(CUDA, device_id="Vulkan1", name="iGPU", unified=True)
    unusable = msgspec.structs.replace(CUDA, device_id="AMD0", usable=False)
    await registry.publish(report(devices=(CPU, CUDA, unified, unusable)), lease_s=5)
    assert json.loads(redis.get("sollol:rpc:node:192.168.1.20:7462")) == {
        "has_gpu": True,
        "gpu_devices": ["CUDA0", "Vulkan1"],
        "gpu_vram_mb": [24576, 0],
        "gpu_names": ["RTX 3090", "iGPU"],
        "cpu_ram_mb": 16384,
    }


async def test_a_node_without_gpu_has_empty_lists_in_the_seeds_record(registry: Registry, redis: Redis):
    await registry.publish(report(), lease_s=5)
    record = json.loads(redis.get("sollol:rpc:node:192.168.1.20:7462"))
    assert record == {"has_gpu": False, "gpu_devices": [], "gpu_vram_mb": [], "gpu_names": [], "cpu_ram_mb": 16384}


async def test_agents_are_found_without_reading_their_reports(registry: Registry, redis: Redis):
    await registry.publish(report("b", host="10.0.0.2"), 5)
    await registry.publish(report("a", host="::1"), 5)
    redis.delete("sollol:node:b")

    assert await registry.addresses() == ("[::1]:7462", "10.0.0.2:7462")


@pytest.mark.parametrize(
    "planted", ["unix:/run/other.sock", "dns:///elsewhere", "host", "host:port", "a b:1", "\xff:1"]
)
async def test_nothing_but_an_address_is_passed_on(registry: Registry, redis: Redis, planted: str):
    await registry.publish(report("a"), 5)
    redis.set("sollol:agent:a", planted, keepttl=True)

    assert await registry.addresses() == ()


async def test_a_silent_node_is_gone_when_its_lease_ends(registry: Registry, redis: Redis, clean_redis: str):
    await registry.publish(report("brief"), lease_s=2)
    await registry.publish(report("lasting"), lease_s=10)
    assert len(reports(clean_redis)) == 2

    async def only_one_left() -> bool:
        return [found.node_id for found in reports(clean_redis)] == ["lasting"]

    await wait_until(only_one_left, within_s=10, what="the lease of `brief` ends")
    await registry.publish(report("lasting"), lease_s=10)
    assert redis.zrange("sollol:nodes", 0, -1) == [b"lasting"]  # publishing sweeps the index


async def test_a_short_lease_does_not_cut_the_index_of_longer_ones(registry: Registry, redis: Redis):
    await registry.publish(report("a"), lease_s=10)
    await registry.publish(report("b"), lease_s=1)
    assert redis.pttl("sollol:nodes") > 5000


async def test_a_withdrawn_report_is_gone_at_once(registry: Registry, redis: Redis, clean_redis: str):
    await registry.publish(report(), lease_s=10)
    await registry.withdraw(report())
    assert reports(clean_redis) == ()
    assert redis.keys() == []


async def test_keys_of_the_wrong_type_heal_with_the_next_report(registry: Registry, redis: Redis):
    redis.set("sollol:nodes", "not an index", px=10_000)
    for key in (node_key("laptop"), agent_key("laptop")):
        redis.hset(key, "a", "hash")
        redis.pexpire(key, 10_000)
    assert await registry.addresses() == ()
    await registry.publish(report(), lease_s=5)
    assert await registry.addresses() == ("192.168.1.20:7462",)
    redis.delete(agent_key("laptop"))
    redis.hset(agent_key("laptop"), "a", "hash")
    redis.pexpire(agent_key("laptop"), 10_000)
    assert await registry.addresses() == ()


async def test_a_flushed_redis_lists_the_node_again_after_its_next_report(
    registry: Registry, redis: Redis, clean_redis: str
):
    await registry.publish(report(), lease_s=5)
    redis.flushall()
    redis.script_flush()
    assert reports(clean_redis) == ()
    await registry.publish(report(), lease_s=5)
    assert len(reports(clean_redis)) == 1


async def test_what_is_recorded_stands_in_the_history_as_it_happened(registry: Registry, clean_redis: str):
    await registry.record("placed", {"model": "a", "score": 1.5})
    await registry.record("reported", report())
    placed, reported = events(clean_redis)
    assert placed == ("placed", {"model": "a", "score": 1.5})
    assert reported[0] == "reported"
    assert msgspec.convert(reported[1], Report) == report()


async def test_the_history_is_capped(registry: Registry, redis: Redis):
    pipeline = redis.pipeline()
    for _ in range(10_500):
        pipeline.xadd("sollol:events", {"kind": "filler", "payload": "0"})
    pipeline.execute()
    await registry.record("last", {})
    assert redis.xlen("sollol:events") < 10_200


async def test_a_burst_of_events_waits_for_connections_and_loses_none(registry: Registry, redis: Redis):
    await asyncio.gather(*(registry.record("burst", {"n": n}) for n in range(200)))
    assert redis.xlen("sollol:events") == 200


async def test_a_redis_that_is_not_there_is_reported_soon(tmp_path: Path):
    registry = Registry(f"unix://{tmp_path}/none.sock")
    begun = time.monotonic()
    for call in (registry.ping(), registry.addresses(), registry.publish(report(), 5), registry.record("a", {})):
        with pytest.raises(RegistryUnavailable):
            await call
    await registry.close()
    assert time.monotonic() - begun < 5


async def test_a_hanging_redis_holds_the_caller_for_a_few_seconds_only_and_then_works_again(tmp_path: Path):
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    process = subprocess.Popen(redis_command(server, tmp_path / "r.sock"), stdout=subprocess.DEVNULL)
    registry = Registry(f"unix://{tmp_path}/r.sock")
    try:
        wait_for_redis(f"unix://{tmp_path}/r.sock")
        await registry.publish(report(), lease_s=30)
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            await registry.addresses()
        assert time.monotonic() - begun < 5
        process.send_signal(signal.SIGCONT)
        assert len(await registry.addresses()) == 1
    finally:
        await registry.close()
        process.kill()
        process.wait()


async def test_the_client_is_named_for_whoever_looks_at_redis(registry: Registry, redis: Redis):
    await registry.ping()
    assert "sollol-test" in {client["name"] for client in redis.client_list()}


async def test_a_cancelled_call_ends_at_whatever_moment_it_is_cancelled(clean_redis: str):
    async def ask_for_ever(registry: Registry) -> None:
        while True:
            await registry.addresses()
            await asyncio.sleep(60)

    for steps in range(60):  # of the event loop: connecting and asking take about forty
        registry = Registry(clean_redis)
        asking = asyncio.create_task(ask_for_ever(registry))
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        done, _ = await asyncio.wait({asking}, timeout=2)
        assert done, f"cancelled after {steps} steps, and goes on"
        assert asking.cancelled()
        await registry.close()


async def test_a_node_s_name_is_one_agent_s_as_long_as_its_lease_stands(registry):
    assert await registry.claim("a", "first", lease_s=10)
    assert await registry.claim("a", "first", lease_s=10), "again, as after a restart"
    assert not await registry.claim("a", "second", lease_s=10)
    assert await registry.claim("b", "second", lease_s=10)


async def test_another_agent_of_that_name_overwrites_nothing_and_takes_nothing_down(registry, clean_redis: str):
    first, second = report("a", agent_token="first"), report("a", agent_token="second", sequence=9)
    assert await registry.publish(first, lease_s=10)
    assert not await registry.publish(second, lease_s=10)
    await registry.withdraw(second)
    assert reports(clean_redis) == (first,)
    await registry.withdraw(first)
    assert reports(clean_redis) == ()
    assert await registry.publish(second, lease_s=10)


async def test_a_name_is_free_when_its_lease_has_ended(registry):
    assert await registry.publish(report("a", agent_token="first"), lease_s=0.05)

    async def taken():
        return await registry.claim("a", "second", lease_s=10)

    await wait_until(taken, what="the lease has ended")
