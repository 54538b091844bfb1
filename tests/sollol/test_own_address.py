"""A daemon and the address it is to listen on, which may come after it."""

import asyncio

import pytest
from sollol.errors import Reason, SollolError
from sollol.lifecycle import Stop
from sollol.own_address import serve_there
from structlog.testing import capture_logs

from tests.waiting import wait_until

NOT_OURS = "192.0.2.5"  # for documentation (RFC 5737): nobody has it


class Served:
    def __init__(self) -> None:
        self.times = 0

    async def __call__(self) -> None:
        self.times += 1


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0", "::", "localhost"])
async def test_an_address_of_ours_is_served_at_once(listen: str):
    served = Served()
    with capture_logs() as logs:
        await serve_there(listen, Stop(), served, within_s=0.0)
    assert (served.times, logs) == (1, [])


@pytest.mark.parametrize(
    ("listen", "why"), [(NOT_OURS, "no interface of this machine has that"), ("nobody.invalid", "names no address")]
)
async def test_another_address_is_waited_for_and_then_refused(listen: str, why: str):
    served = Served()
    with capture_logs() as logs, pytest.raises(SollolError) as refused:
        await serve_there(listen, Stop(), served, within_s=0.6)
    assert refused.value.refusal.reason is Reason.PORT_TAKEN
    assert f"cannot listen on {listen}: " in refused.value.refusal.message
    assert why in refused.value.refusal.message
    assert [entry["event"] for entry in logs] == ["address_awaited"]
    assert served.times == 0


async def test_who_waits_for_an_address_can_be_stopped():
    stop, served = Stop(), Served()
    with capture_logs() as logs:
        waiting = asyncio.create_task(serve_there(NOT_OURS, stop, served))
        await wait_until(lambda: logs, what="it waits")
        stop.request("test")
        await asyncio.wait_for(waiting, 5)
    assert served.times == 0
