"""What an agent says of itself over a real broker."""

import tempfile
from pathlib import Path

import pytest

from tests.daemon import agent_flags, daemon, write_engine

STATUS = "sollol/v1/home/node/a/status"


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
