"""Who connects to a backend past its forwarder is seen: the kernel knows whose a connection is."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from sollol.errors import Reason

from agent.supervisor.lending import backend_id
from agent.supervisor.owner import Limits
from agent.supervisor.strangers import other_user
from tests.supervised import record_of, site_of, supervising, wish_of
from tests.waiting import wait_until

US, OTHER, PORT = 1000, 1001, 7500  # 0x1D4C; addresses are as little-endian kernels write them


def line(remote: str, user: int) -> str:
    return f"   1: 0100007F:C350 {remote} 01 00000000:00000000 00:00000000 00000000  {user}        0 31337 1 0 20 4 30 10 -1"


@pytest.mark.parametrize(
    ("remote", "user", "seen"),
    [
        ("0100007F:1D4C", OTHER, OTHER),
        ("0000000000000000FFFF00000100007F:1D4C", OTHER, OTHER),
        ("0100007F:1D4C", US, None),
        ("0100007F:1D4C", 0, None),
        ("0100007F:1D4D", OTHER, None),
        ("0A00000A:1D4C", OTHER, None),
    ],
)
def test_a_stranger_is_another_user_whose_connection_leads_to_that_port_of_this_machine(
    remote: str, user: int, seen: int | None
) -> None:
    assert other_user([line("00000000:0000", OTHER), line(remote, user)], PORT, us=US) == seen


@pytest.mark.root
@pytest.mark.engine
async def test_a_backend_is_ended_when_another_user_is_connected_to_it(
    tmp_path: Path, engine_binary: Path, ports: Callable[[], int]
) -> None:
    first = ports()
    site = site_of(engine_binary.parent / "ggml-rpc-server", ports=range(first, first + 10))
    limits = Limits(freeze_poll_s=0.1, stop_grace_s=5)
    async with supervising(tmp_path, (str(engine_binary),), limits=limits, site=site) as supervisor:
        await supervisor.start_backend(wish_of("p"))
        knock = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.recv(1)"
        stranger = await asyncio.create_subprocess_exec(
            "/usr/bin/env", "python3", "-c", knock, str(record_of(tmp_path, backend_id("p")).port),
            stderr=asyncio.subprocess.DEVNULL, user=65_534, cwd="/",
        )  # fmt: skip
        refusal = await wait_until(lambda: supervisor.failure_of(backend_id("p")), within_s=15, what="it is ended")
        await stranger.wait()
    assert (refusal.reason, refusal.numbers) == (Reason.ENGINE_DIED, {"user": 65_534})
    assert "past its forwarder" in refusal.message
