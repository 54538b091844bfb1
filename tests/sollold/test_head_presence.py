"""What a head says of itself over a real broker."""

import json
import tempfile
from pathlib import Path

import aiohttp
import pytest
from sollol.report import CoordinatorPlan, Decision, DeviceShare

from sollold.decision_event import event_of
from tests.daemon import agent_flags, daemon, write_engine
from tests.waiting import wait_until

STATUS = "sollol/v1/home/head/h/status"


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sh") as directory:
        yield Path(directory)


@pytest.fixture
def flags(ports):
    """What a head is started with, but for the broker."""
    return ["--http-port", str(ports()), "--grpc-port", str(ports()), "--redis-url", "", "--mqtt-head-id", "h"]


async def test_it_is_online_while_it_serves_and_offline_at_its_end_however_it_comes(home, flags, broker):
    heard = await broker.listen("sollol/#")
    words = [*flags, "--mqtt-url", broker.url, "--mqtt-cluster", "home"]
    async with daemon("sollold", home, *words) as head:
        await heard.says(STATUS, "online", within_s=20)
        head.process.terminate()
        await heard.says(STATUS, "offline", within_s=1)
        assert await head.ended() == 0
    async with daemon("sollold", home, *words) as head:
        await heard.says(STATUS, "online", within_s=20)
        head.process.kill()
        await heard.says(STATUS, "offline", within_s=3)


async def test_a_broker_that_is_down_costs_a_head_nothing_but_a_line(home, flags, new_broker):
    async with daemon("sollold", home, *flags, "--mqtt-url", new_broker().url) as head:
        await head.says("head_ready")
        await head.says("mqtt_lost")
        assert await head.end() == 0
    assert "Traceback" not in head.log


def decision(**more):
    return Decision(model="m", policy="fit", unit="ms/token", nodes=(), **more)


def test_a_placement_names_its_nodes_the_coordinators_first():
    shares = tuple(DeviceShare(device_id="CPU", layers=1, node_id=node) for node in ("", "b", "b", "c"))
    plan = CoordinatorPlan(model="m", parallel=1, context_per_slot=1, shares=shares)
    event = event_of(decision(coordinator="a", plan=plan), "h", 5.0)
    assert (event.event, event.head_id, event.nodes, event.unix_s) == ("placement", "h", ("a", "b", "c"), 5.0)


async def test_what_cannot_be_placed_is_told_with_the_reason(home, flags, broker, ports, reciting_model):
    heard = await broker.listen("sollol/#")
    port = ports()
    agent_words = agent_flags(home, port=port, engine=write_engine(home / "engine"), model=reciting_model)
    words = [*flags, "--mqtt-url", broker.url, "--mqtt-cluster", "home", "--agents", f"127.0.0.1:{port}"]
    async with (
        daemon("agent", home, *agent_words, "--caps", "CPU=1000") as agent,
        daemon("sollold", home, *words) as head,
    ):
        await agent.says("agent_ready")
        await head.says("node_connected")
        await head.says("head_ready")
        body = {"model": "tiny-reciter", "prompt": "x"}
        url = f"http://127.0.0.1:{flags[flags.index('--http-port') + 1]}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            assert response.status == 503
        await wait_until(lambda: heard.on("sollol/v1/home/event"), within_s=20, what="told")
    event = json.loads(heard.on("sollol/v1/home/event")[0])
    assert (event["event"], event["model"], event["reason"], event["head_id"]) == (
        "refused",
        "tiny-reciter",
        "NO_FIT",
        "h",
    )
