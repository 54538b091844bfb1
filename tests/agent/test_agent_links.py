import asyncio
from math import isclose

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, SollolError, refuse
from sollol.link import Link
from structlog.testing import capture_logs

from agent.link_probe import Probed
from agent.links import JUST_NOW_S, MOST_LINKS, Links

NEAR = Probed(node_id="b", boot_id="boot-b", rtt_s=0.0002, bytes_per_s=1.1e8)
GONE = refuse(Reason.AGENT_UNREACHABLE, "no route", retryable=True)


class Net:
    """What a probe finds, by host; the clock stands until it is moved."""

    def __init__(self):
        self.found, self.asked, self.now_s = {}, [], 100.0
        self.probing = self.most_probing = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.links = Links(probe=self.probe, clock=lambda: self.now_s)

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


@pytest.fixture
async def net():
    return Net()


async def test_what_was_measured_is_kept_with_its_age(net):
    net.found["10.0.0.2"] = NEAR
    measured = await net.links.measure("b", "10.0.0.2", 7462)
    net.now_s += 7

    assert measured == Link(node_id="b", rtt_s=0.0002, bytes_per_s=1.1e8, boot_id="boot-b")
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


async def test_a_node_out_of_reach_is_reported_so_and_logged_once_each_way(net):
    net.found["10.0.0.2"] = GONE
    with capture_logs() as logs:
        for found in (GONE, GONE, NEAR, NEAR):
            net.found["10.0.0.2"] = found
            net.now_s += JUST_NOW_S
            last = await net.links.measure("b", "10.0.0.2", 7462)
            assert last.unreachable == (found is GONE)

    assert [entry["event"] for entry in logs] == ["peer_unreachable", "peer_reachable"]
    assert net.links.all() == (last,)


async def test_an_address_where_another_node_answers_leads_nowhere(net):
    """Two machines whose agents both say that they are at 127.0.0.1."""
    net.found["127.0.0.1"] = replace(NEAR, node_id="a")
    with capture_logs() as logs:
        assert (await net.links.measure("b", "127.0.0.1", 7462)).unreachable

    assert logs[0]["problem"] == "node a answers there"


async def test_an_agent_that_refuses_is_no_result(net):
    net.found["10.0.0.2"] = refuse(Reason.INTERNAL, "unknown method ProbeLink")
    with pytest.raises(SollolError, match="INTERNAL"):
        await net.links.measure("b", "10.0.0.2", 7462)

    assert net.links.all() == ()


async def test_of_very_many_links_the_oldest_are_forgotten(net):
    net.found["10.0.0.2"] = GONE
    for at in range(MOST_LINKS + 3):
        await net.links.measure(f"n{at}", "10.0.0.2", 7462)
    await net.links.measure("n3", "10.0.0.2", 7463)

    kept = [link.node_id for link in net.links.all()]
    assert len(kept) == MOST_LINKS
    assert (kept[0], kept[-1]) == ("n4", "n3")
