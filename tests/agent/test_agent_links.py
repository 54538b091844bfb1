import asyncio
from math import isclose

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, SollolError, refuse
from sollol.link import Link
from structlog.testing import capture_logs

from agent import links as module
from agent.link_probe import Probed
from agent.links import FORGOTTEN_AFTER_S, JUST_NOW_S, LASTS_S, MOST_LINKS, Links
from tests.waiting import wait_until

NEAR = Probed(node_id="b", boot_id="boot-b", rtt_s=0.0002, bytes_per_s=1.1e8)
GONE = refuse(Reason.AGENT_UNREACHABLE, "no route", retryable=True)


class Net:
    """What a probe finds, by host; the clock stands until it is moved."""

    def __init__(self):
        self.found, self.asked, self.now_s, self.changes = {}, [], 100.0, 0
        self.probing = self.most_probing = 0
        self.retried_at = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.links = Links(probe=self.probe, who=self.who, clock=lambda: self.now_s)
        self.links.subscribe(self.changed)

    async def probe(self, host, port):
        self.asked.append((host, port))
        self.probing += 1
        self.most_probing = max(self.most_probing, self.probing)
        await self.go_on.wait()
        self.probing -= 1
        found = self.found[host]
        if isinstance(found, Exception):
            raise found
        return found

    async def who(self, host, port):
        self.retried_at.append(host)
        await self.go_on.wait()
        found = self.found[host]
        if isinstance(found, Exception):
            raise found
        return found.node_id

    @property
    def retries(self):
        return len(self.retried_at)

    def changed(self):
        self.changes += 1

    async def retried(self):
        """Wait until everything out of reach has been tried once more, now."""
        before = self.retries
        await wait_until(lambda: self.retries > before + 1, what="tried again")


@pytest.fixture
async def net(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.005)
    net = Net()
    running = asyncio.create_task(net.links.run())
    yield net
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_was_measured_is_kept_with_its_age(net):
    net.found["10.0.0.2"] = NEAR
    measured = await net.links.measure("b", "10.0.0.2", 7462)
    net.now_s += 7

    assert measured == Link(node_id="b", rtt_s=0.0002, bytes_per_s=1.1e8, boot_id="boot-b", address="10.0.0.2:7462")
    assert net.links.all() == (replace(measured, age_s=7.0),)


async def test_a_second_head_gets_what_the_first_one_has_just_got(net):
    net.found["10.0.0.2"] = NEAR
    net.go_on.clear()
    both = [asyncio.create_task(net.links.measure("b", "10.0.0.2", 7462)) for _ in range(2)]
    await asyncio.sleep(0)
    net.go_on.set()

    assert len({await each for each in both}) == 1
    assert net.asked == [("10.0.0.2", 7462)]


async def test_it_is_measured_again_when_it_is_older_or_at_another_address(net):
    net.found |= {"10.0.0.2": NEAR, "10.9.0.2": replace(NEAR, rtt_s=0.004)}
    await net.links.measure("b", "10.0.0.2", 7462)
    moved = await net.links.measure("b", "10.9.0.2", 7462)
    net.now_s += JUST_NOW_S
    await net.links.measure("b", "10.9.0.2", 7462)

    assert isclose(moved.rtt_s, 0.004)
    assert len(net.asked) == 3
    assert [link.age_s for link in net.links.all()] == [0.0]


async def test_one_link_is_measured_at_a_time(net):
    net.found |= {f"10.0.0.{at}": replace(NEAR, node_id=f"n{at}") for at in range(5)}
    await asyncio.gather(*(net.links.measure(f"n{at}", f"10.0.0.{at}", 7462) for at in range(5)))

    assert net.most_probing == 1
    assert {link.node_id for link in net.links.all()} == {f"n{at}" for at in range(5)}


async def test_a_node_out_of_reach_is_told_to_whoever_asked_and_reported_when_it_lasts(net):
    net.found["10.0.0.2"] = GONE
    with capture_logs() as logs:
        told = await net.links.measure("b", "10.0.0.2", 7462)
        await net.retried()
        assert (net.links.all(), net.changes, logs) == ((), 0, [])

        net.now_s += LASTS_S
        await net.retried()
        net.now_s += 2
        (reported,) = net.links.all()

    assert told == Link(node_id="b", unreachable=True, address="10.0.0.2:7462")
    assert reported.unreachable
    assert reported.age_s <= 2
    assert net.changes == 1
    assert [(entry["event"], entry["problem"]) for entry in logs] == [("peer_unreachable", "no route")]
    assert len(net.asked) == 1


async def test_it_is_reported_no_more_once_it_answers_again(net):
    net.found["10.0.0.2"] = GONE
    await net.links.measure("b", "10.0.0.2", 7462)
    net.now_s += LASTS_S
    await net.retried()
    assert [link.unreachable for link in net.links.all()] == [True]

    with capture_logs() as logs:
        net.found["10.0.0.2"] = NEAR
        await wait_until(lambda: net.links.all() == (), what="it is out of the report, and heads have it measured")
    assert net.changes == 2
    assert [entry["event"] for entry in logs] == ["peer_reachable"]
    assert not (await net.links.measure("b", "10.0.0.2", 7462)).unreachable


async def test_a_hiccup_leaves_what_was_measured_as_it_is(net):
    net.found["10.0.0.2"] = NEAR
    await net.links.measure("b", "10.0.0.2", 7462)
    net.now_s += JUST_NOW_S
    net.found["10.0.0.2"] = GONE
    assert (await net.links.measure("b", "10.0.0.2", 7462)).unreachable
    assert [(link.unreachable, link.age_s) for link in net.links.all()] == [(False, JUST_NOW_S)]
    net.now_s += LASTS_S
    await net.retried()
    assert [link.unreachable for link in net.links.all()] == [True]

    net.found["10.0.0.2"] = NEAR
    await wait_until(lambda: not net.links.all()[0].unreachable, what="what was measured before counts again")


async def test_it_is_measured_at_once_where_it_has_moved_to(net):
    net.found |= {"10.0.0.2": GONE, "10.9.0.2": NEAR}
    net.go_on.clear()
    asked = asyncio.create_task(net.links.measure("b", "10.0.0.2", 7462))
    net.go_on.set()
    assert (await asked).unreachable
    net.go_on.clear()
    await wait_until(lambda: net.retries, what="it is being tried again")
    moved = asyncio.create_task(net.links.measure("b", "10.9.0.2", 7462))
    net.go_on.set()

    assert not (await moved).unreachable
    await wait_until(lambda: [link.address for link in net.links.all()] == ["10.9.0.2:7462"], what="there it is")


async def test_an_address_where_another_node_answers_leads_nowhere(net):
    """Two machines whose agents both say that they are at 127.0.0.1."""
    net.found["127.0.0.1"] = replace(NEAR, node_id="a")
    assert (await net.links.measure("b", "127.0.0.1", 7462)).unreachable
    net.now_s += LASTS_S
    with capture_logs() as logs:
        await net.retried()

    assert logs[0]["problem"] == "node a answers there"
    assert [(link.node_id, link.unreachable) for link in net.links.all()] == [("b", True)]


async def test_a_node_that_has_left_for_good_is_not_tried_for_ever(net):
    net.found["10.0.0.2"] = GONE
    await net.links.measure("b", "10.0.0.2", 7462)
    net.now_s += FORGOTTEN_AFTER_S + 1
    await wait_until(lambda: net.retries, what="tried once more")

    net.found["10.0.0.3"] = GONE
    await net.links.measure("c", "10.0.0.3", 7462)
    await net.retried()
    net.retried_at.clear()
    await net.retried()
    assert set(net.retried_at) == {"10.0.0.3"}


async def test_an_agent_that_refuses_is_no_result(net):
    net.found["10.0.0.2"] = refuse(Reason.INTERNAL, "unknown method ProbeLink")
    with pytest.raises(SollolError, match="INTERNAL"):
        await net.links.measure("b", "10.0.0.2", 7462)

    assert net.links.all() == ()


async def test_of_very_many_links_the_oldest_are_forgotten(net):
    for at in range(MOST_LINKS + 3):
        net.found["10.0.0.2"] = replace(NEAR, node_id=f"n{at}")
        await net.links.measure(f"n{at}", "10.0.0.2", 7462)
    net.found["10.0.0.2"] = replace(NEAR, node_id="n3")
    await net.links.measure("n3", "10.0.0.2", 7463)

    kept = [link.node_id for link in net.links.all()]
    assert len(kept) == MOST_LINKS
    assert (kept[0], kept[-1]) == ("n4", "n3")
