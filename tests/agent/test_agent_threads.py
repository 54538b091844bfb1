import asyncio
import gc
import threading
from collections.abc import Callable

import pytest

from agent.threads import SlowReading
from tests.waiting import wait_until


class Source:
    """Counts its calls and hangs in each while told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self) -> int:
        self.calls += 1
        call = self.calls
        self.go_on.wait(10)
        return call


def reading(read: Callable[[], int], now: list[float], deadline_s: float = 0.03) -> SlowReading[int]:
    return SlowReading(read, initial=0, name="test", deadline_s=deadline_s, clock=lambda: now[0])


async def test_a_quick_call_is_fresh():
    source = Source()
    slow = reading(source, [0.0], deadline_s=5)
    assert [await slow.newest(), await slow.newest()] == [(1, 0.0), (2, 0.0)]


async def test_a_hanging_call_gives_the_last_value_with_its_age_and_is_the_only_one():
    source, now = Source(), [0.0]
    slow = reading(source, now, deadline_s=10)
    await slow.newest()
    slow._deadline_s = 0.03  # from here on: a good reading may be slow on a busy machine
    source.go_on.clear()
    now[0] = 4.0
    assert await slow.newest() == (1, 4.0)
    assert slow.overdue
    now[0] = 6.0
    assert await slow.newest() == (1, 6.0)
    assert source.calls == 2
    source.go_on.set()

    slow._deadline_s = 10

    async def back() -> bool:
        return (await slow.newest()).value >= 2

    await wait_until(back, what="the call that hung delivers")
    assert not slow.overdue


async def test_what_the_call_raises_reaches_the_waiter_and_the_last_value_stays():
    answers = iter([lambda: 7])

    def read() -> int:
        answer = next(answers, None)
        if answer is None:
            raise OSError("disk gone")
        return answer()

    slow = reading(read, [0.0], deadline_s=5)
    await slow.newest()
    with pytest.raises(OSError, match="disk gone"):
        await slow.newest()
    assert slow.last() == (7, 0.0)


async def test_a_failure_that_comes_when_nobody_waits_any_more_is_none_to_complain_of():
    complaints, go_on = [], threading.Event()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context["message"]))

    def read() -> int:
        go_on.wait(10)
        raise OSError("disk gone")

    async def given_up() -> None:
        slow = reading(read, [0.0], deadline_s=5)
        waiting = asyncio.create_task(slow.newest())
        await wait_until(lambda: slow._pending is not None, what="it reads")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        await wait_until(slow._pending.done, what="it fails")

    await given_up()
    gc.collect()
    assert complaints == []


async def test_waiters_together_share_one_call():
    source = Source()
    slow = reading(source, [0.0], deadline_s=5)
    assert await asyncio.gather(*(slow.newest() for _ in range(5))) == [(1, 0.0)] * 5


def test_a_call_that_never_returns_does_not_hold_the_loop_at_its_end():
    source = Source()
    source.go_on.clear()
    assert asyncio.run(reading(source, [0.0]).newest()).value == 0
    source.go_on.set()
