"""Decisions reach the registry when it is there, and wait for it, bounded, when it is not."""

import asyncio

import pytest
from redis import Redis
from sollol.errors import Reason, refuse
from sollol.registry import Registry, RegistryUnavailable
from sollol.report import Decision

from sollold import history as module
from sollold.history import KEPT_UNWRITTEN, History
from tests.notice_board import events
from tests.waiting import wait_until


def decision(model="m", refusal=None):
    return Decision(model=model, policy="fit", unit="ms/token", nodes=(), coordinator="a", refusal=refusal)


class Log:
    def __init__(self):
        self.up, self.tries, self.written = True, 0, []

    async def record(self, kind, payload):
        self.tries += 1
        if not self.up:
            raise RegistryUnavailable("down")
        self.written.append((kind, payload.model))


@pytest.fixture
async def running(monkeypatch):
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.01)
    log, history = Log(), History(written=True)
    task = asyncio.create_task(history.run(log))
    yield log, history
    task.cancel()
    await asyncio.wait({task})


async def test_decisions_are_written_in_order(running):
    log, history = running
    history.decided(decision("a"))
    history.decided(decision("b", refuse(Reason.NO_FIT, "too big").refusal))

    await wait_until(lambda: len(log.written) == 2, what="both written")

    assert log.written == [("decision", "a"), ("decision", "b")]


async def test_while_the_registry_is_away_the_newest_are_kept_and_written_when_it_is_back(running):
    log, history = running
    log.up = False
    history.decided(decision("first"))
    await wait_until(lambda: log.tries > 2, what="tried again")
    for number in range(KEPT_UNWRITTEN + 50):
        history.decided(decision(str(number)))

    log.up = True
    await wait_until(lambda: len(log.written) == KEPT_UNWRITTEN + 1, what="written")

    assert [model for _, model in log.written] == ["first", *(str(number) for number in range(50, KEPT_UNWRITTEN + 50))]


async def test_without_a_registry_nothing_is_kept():
    history = History(written=False)
    for _ in range(10):
        history.decided(decision())

    assert history._unwritten.empty()


async def test_the_real_registry_takes_the_record_as_it_is(clean_redis):
    registry, history = Registry(clean_redis), History(written=True)
    task = asyncio.create_task(history.run(registry))
    history.decided(decision("m", refuse(Reason.NO_FIT, "too big").refusal))

    def entries():
        with Redis.from_url(clean_redis) as redis:
            return redis.xlen("sollol:events")

    await wait_until(entries, what="one entry")
    ((_, payload),) = events(clean_redis)
    task.cancel()
    await asyncio.wait({task})
    await registry.close()

    assert payload["refusal"]["reason"] == "NO_FIT"
