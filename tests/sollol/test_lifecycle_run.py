"""Background work of a daemon: it lives until its turn to close, or the daemon ends with it."""

import asyncio

import pytest
from sollol.lifecycle import Closing, Stop, UncleanStop


async def daemon_with(work):
    stop = Stop()
    async with asyncio.timeout(2), Closing() as closing:
        closing.run("work", work, stop, within_s=1)
        await stop.wait()
    return stop


async def closed_after_its_start(work, *, within_s):
    stop = Stop()
    async with Closing() as closing:
        closing.run("work", work, stop, within_s=within_s)
        await asyncio.sleep(0)
    return stop


async def returns():
    pass


async def breaks():
    raise ZeroDivisionError


async def cancelled_from_below():
    """Libraries raise CancelledError too: a daemon must not go on without a part that ended so."""
    raise asyncio.CancelledError


@pytest.mark.parametrize("work", [returns, breaks, cancelled_from_below])
async def test_work_that_ends_early_in_any_way_stops_the_daemon_uncleanly(work):
    with pytest.raises(UncleanStop, match="work"):
        await daemon_with(work())


async def test_work_that_ends_by_itself_when_cancelled_is_a_clean_end():
    async def tidy():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return  # as loops that flush do

    assert not (await closed_after_its_start(tidy(), within_s=1)).requested


async def test_work_that_breaks_while_closing_is_unclean():
    async def clumsy():
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError

    with pytest.raises(UncleanStop):
        await closed_after_its_start(clumsy(), within_s=1)


async def test_work_deaf_to_cancellation_is_left_after_its_bound():
    go_on = asyncio.Event()

    async def deaf():
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(UncleanStop):
        await asyncio.wait_for(closed_after_its_start(deaf(), within_s=0.05), 1)
    go_on.set()
