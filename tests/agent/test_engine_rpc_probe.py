import asyncio
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.engine.ask import Answer, ask
from agent.engine.environment import engine_environment
from agent.engine.rpc_probe import rpc_protocol

CLIENT = Path(__file__).parents[1] / "fakes" / "rpc_client.py"


@pytest.mark.parametrize("version", ["7.0", "7.2", "8.0", "6.1"])
async def test_the_protocol_is_the_highest_version_that_the_engine_accepts(version):
    async def engine(more: tuple[str, ...]) -> Answer:
        return await ask((sys.executable, "-I", str(CLIENT), version, *more), {})

    assert await rpc_protocol(engine) == version


async def test_an_engine_of_an_unknown_version_counts_as_unable():
    async def engine(more: tuple[str, ...]) -> Answer:
        return await ask((sys.executable, "-I", str(CLIENT), "3.0", *more), {})

    assert await rpc_protocol(engine) is None


async def test_an_engine_without_rpc_is_asked_only_once():
    asked = []

    async def engine(more: tuple[str, ...]) -> Answer:
        asked.append(more)
        return Answer(1, errors="error: RPC not supported in this build")

    assert await rpc_protocol(engine) is None
    assert len(asked) == 1


async def test_an_engine_that_is_overdue_once_is_asked_again():
    asked = []

    async def engine(more: tuple[str, ...]) -> Answer:
        asked.append(more)
        if len(asked) == 1:
            return Answer(None, errors="gave no answer within 10 s")
        return await ask((sys.executable, "-I", str(CLIENT), "7.0", *more), {})

    assert await rpc_protocol(engine) == "7.0"


async def test_an_engine_that_is_overdue_twice_is_told_of_and_not_asked_for_ever():
    asked = []

    async def engine(more: tuple[str, ...]) -> Answer:
        asked.append(more)
        return Answer(None, errors="gave no answer within 10 s")

    with capture_logs() as logs:
        assert await rpc_protocol(engine) is None
    assert len(asked) == 2
    assert [(entry["event"], entry["problem"]) for entry in logs] == [
        ("engine_rpc_unknown", "gave no answer within 10 s")
    ]


async def test_an_engine_that_is_overdue_at_a_minor_version_is_unknown_and_not_taken_for_a_lower_one():
    async def engine(more: tuple[str, ...]) -> Answer:
        answer = await ask((sys.executable, "-I", str(CLIENT), "7.1", *more), {})
        return answer if answer.status == 0 else Answer(None, errors="gave no answer within 10 s")

    assert await rpc_protocol(engine) is None


async def test_an_engine_that_connects_but_lists_no_device_is_not_believed():
    async def engine(more: tuple[str, ...]) -> Answer:
        host, port = more[1].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x0e" + (24).to_bytes(8, "little") + bytes(24))
        assert len(await reader.readexactly(36)) == 36
        writer.close()
        await writer.wait_closed()
        return Answer(0, "Available devices:\n  (none)\n")

    assert await rpc_protocol(engine) is None


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x06" + b"\xff" * 8, b"\x63" + bytes(8)])
async def test_noise_on_the_probes_port_ends_that_connection_and_nothing_else(noise):
    async def engine(more: tuple[str, ...]) -> Answer:
        host, port = more[1].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(noise)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        return Answer(1)

    assert await rpc_protocol(engine) is None


@pytest.mark.engine
async def test_the_real_engine_speaks_the_protocol_that_the_probe_finds(engine_binary):
    async def engine(more: tuple[str, ...]) -> Answer:
        return await ask((str(engine_binary), *more), engine_environment({}))

    assert await rpc_protocol(engine) == "7.0"
