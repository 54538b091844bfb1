"""What an agent says of itself over a real broker."""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from tests.daemon import agent_flags, daemon, start_engine, write_engine
from tests.waiting import wait_until

STATUS = "sollol/v1/home/node/a/status"
STATE = "sollol/v1/home/node/a/state"
POOL = "sollol/v1/home/pool/p/state"
EVENT = "sollol/v1/home/event"
CONFIG = "homeassistant/device/sollol_home_a/config"


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sp") as directory:
        yield Path(directory)


@pytest.fixture
def flags(home, ports, reciting_model):
    """What an agent is started with, but for the broker."""
    return agent_flags(home, port=ports(), engine=write_engine(home / "engine"), model=reciting_model)


def mqtt(broker):
    return ["--mqtt-url", broker.url, "--mqtt-cluster", "home"]


def said(heard, topic):
    """The newest word on a topic, as JSON; None for none, {} for a removed one."""
    last = heard.last(topic)
    return None if last is None else json.loads(last or "{}")


async def pool_is(heard, state):
    await wait_until(lambda: (said(heard, POOL) or {}).get("state") == state, within_s=10, what=f"the pool is {state}")


def events(heard):
    return [json.loads(payload)["event"] for payload in heard.on(EVENT)]


def port_of(flags):
    return int(flags[flags.index("--port") + 1])


async def test_it_is_online_while_it_serves_and_offline_as_soon_as_it_is_told_to_end(home, flags, broker):
    heard = await broker.listen("sollol/#")
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await heard.says(STATUS, "online", within_s=20)
        agent.process.terminate()
        await heard.says(STATUS, "offline", within_s=1)
        assert await agent.ended() == 0
    assert "Traceback" not in agent.log


async def test_a_killed_agent_is_offline_within_three_seconds(home, flags, broker):
    heard = await broker.listen("sollol/#")
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await heard.says(STATUS, "online", within_s=20)
        agent.process.kill()
        await heard.says(STATUS, "offline", within_s=3)


async def test_a_broker_that_is_down_costs_an_agent_nothing_but_a_line(home, flags, new_broker):
    async with daemon("agent", home, *flags, *mqtt(new_broker())) as agent:
        await agent.says("agent_ready")
        await agent.says("mqtt_lost")
        assert await agent.end() == 0
    assert '"reason":"BROKER_UNREACHABLE"' in agent.log
    assert "Traceback" not in agent.log


async def test_a_password_file_that_is_not_there_is_refused_in_one_line(home, flags, broker):
    words = ["--mqtt-url", f"mqtt://u@127.0.0.1:{broker.port}", "--mqtt-password-file", str(home / "none")]
    async with daemon("agent", home, *flags, *words) as agent:
        assert await agent.ended() == 2
    assert "mqtt_password_file = " in agent.log
    assert "Traceback" not in agent.log


async def test_a_url_that_names_no_broker_is_refused_without_its_password(home, flags):
    async with daemon("agent", home, *flags, "--mqtt-url", "http://u:secret@box") as agent:
        assert await agent.ended() == 2
    assert "mqtt_url is not mqtt://" in agent.log
    assert "secret" not in agent.log


async def test_a_pool_appears_with_its_state_and_its_events_and_is_removed_with_its_agent(home, flags, broker):
    heard = await broker.listen("sollol/#", "homeassistant/#")
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await heard.says(STATUS, "online", within_s=20)
        await start_engine(port_of(flags))
        await pool_is(heard, "READY")
        await wait_until(lambda: said(heard, STATE)["pools_ready"] == 1, what="the node counts it")
        node, pool = said(heard, STATE), said(heard, POOL)
        late = await broker.listen("sollol/#", "homeassistant/#")
        assert {(topic, retained) for retained, topic, _ in late.messages} >= {
            (STATUS, True),
            (STATE, True),
            (POOL, True),
            (CONFIG, True),
        }
        assert not late.on(EVENT), "events are not retained"
        assert await agent.end() == 0

    assert 0 < node["free_bytes"] < node["total_bytes"]
    assert node["free_bytes"] == sum(device["free_bytes"] for device in node["devices"])
    assert (pool["model"], pool["node_id"], pool["slots"], pool["bytes"]) == ("tiny-reciter", "a", 1, 1 << 20)
    assert events(heard)[:2] == ["start", "ready"]
    assert "lost" not in events(heard)
    await heard.says(POOL, "")
    await heard.says(STATUS, "offline")
    after = await broker.listen("sollol/#")
    assert after.on(POOL) == []


async def test_a_pool_that_outlives_its_agent_keeps_its_state_and_the_next_agent_goes_on_with_it(home, flags, broker):
    heard = await broker.listen("sollol/#")
    async with daemon("agent", home, *flags, *mqtt(broker), "--leave-engines") as agent:
        await heard.says(STATUS, "online", within_s=20)
        await start_engine(port_of(flags))
        await pool_is(heard, "READY")
        assert await agent.end() == 0, agent.log
    await heard.says(STATUS, "offline")
    assert said(heard, POOL)["state"] == "READY"

    before, told = len(heard.on(POOL)), len(heard.on(EVENT))
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await wait_until(lambda: len(heard.on(POOL)) > before, within_s=20, what="its state is renewed")
        await heard.says(STATUS, "online")
        await pool_is(heard, "READY")
        assert "lost" not in events(heard)[told:]
        assert await agent.end() == 0, agent.log
    await heard.says(POOL, "")  # this one took the pool with it


async def test_an_engine_that_dies_is_told_as_lost_with_its_reason(home, flags, broker):
    heard = await broker.listen("sollol/#")
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await heard.says(STATUS, "online", within_s=20)
        instance = await start_engine(port_of(flags))
        await pool_is(heard, "READY")
        os.kill(instance.pid, signal.SIGKILL)
        await wait_until(lambda: "lost" in events(heard), within_s=10, what="told")
        assert await agent.end() == 0, agent.log
    lost = next(event for event in map(json.loads, heard.on(EVENT)) if event["event"] == "lost")
    assert (lost["pool_id"], lost["model"], lost["reason"]) == ("p", "tiny-reciter", "ENGINE_DIED")


async def test_home_assistant_is_told_again_when_it_starts_and_taken_out_when_discovery_is_off(home, flags, broker):
    heard = await broker.listen("homeassistant/#")
    async with daemon("agent", home, *flags, *mqtt(broker)) as agent:
        await wait_until(lambda: len(heard.on(CONFIG)) == 1, within_s=20, what="told")
        await broker.publish("homeassistant/status", "online")
        await wait_until(lambda: len(heard.on(CONFIG)) == 2, what="told again")
        assert await agent.end() == 0
    assert said(heard, CONFIG)["cmps"]["free_memory"]["state_topic"] == STATE
    async with daemon("agent", home, *flags, *mqtt(broker), "--no-mqtt-discovery") as agent:
        await wait_until(lambda: heard.last(CONFIG) == "", within_s=20, what="taken out")
        assert await agent.end() == 0


async def test_state_that_nobody_renews_expires(home, flags, broker):
    async with daemon(
        "agent", home, *flags, *mqtt(broker), "--mqtt-interval-s", "0.4", "--heartbeat-s", "0.2"
    ) as agent:
        heard = await broker.listen("sollol/#")
        await wait_until(lambda: len(heard.on(STATE)) >= 3, within_s=20, what="renewed")
        agent.process.kill()
        await agent.ended()

        async def expired():
            return not (await broker.listen(STATE)).on(STATE)

        await wait_until(expired, within_s=5, what="expired")
