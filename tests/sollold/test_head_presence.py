"""What a head says of itself over a real broker."""

import tempfile
from pathlib import Path

import pytest

from tests.daemon import daemon

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
