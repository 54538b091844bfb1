"""What is left of lost pools ends at once, wherever it turns up; what may be well is left alone."""

import asyncio
import contextlib

import pytest
from msgspec.structs import replace
from sollol.errors import SUSPECTED_BACKENDS, Reason, SollolError, refuse
from sollol.report import DeviceShare, Instance, InstanceKind, InstanceState

from sollold import reaping
from sollold.away import LOST_AFTER_RESTART_S, LOST_AFTER_S
from sollold.reaping import Reaper
from tests.placement_cases import node
from tests.waiting import wait_until

POOL = "pool-1"
LENDS = Instance(
    instance_id=f"{POOL}.backend", pool_id=POOL, model="", state=InstanceState.READY, kind=InstanceKind.BACKEND
)
SERVES = Instance(
    instance_id=POOL,
    pool_id=POOL,
    model="m",
    state=InstanceState.READY,
    kind=InstanceKind.COORDINATOR,
    shares=tuple(DeviceShare(node_id=name, device_id="CPU", layers=4) for name in ("b", "c")),
)
DIED = refuse(Reason.ENGINE_DIED, "it aborted").refusal
OTHER = refuse(Reason.ENGINE_DIED, "its stream broke").refusal
UNSURE = refuse(Reason.ENGINE_DIED, "its backend on b or c was lost", numbers={SUSPECTED_BACKENDS: 2}).refusal
KILLED = refuse(Reason.ENGINE_DIED, "the backend on c ended (SIGKILL)").refusal


class Cluster:
    """Nodes a (coordinator), b and c (backends), as a head sees them; a stopped part is out of the next report."""

    def __init__(self):
        self.nodes = {"a": node("a", instances=(SERVES,)), "b": self.lending("b"), "c": self.lending("c")}
        self.stopped, self.lost, self.now_s = [], [], 0.0
        self.refusals = {}
        self.hangs = False
        self.reaper = Reaper(self, on_lost=lambda pool_id, why: self.lost.append((pool_id, why)), clock=self.clock)

    @staticmethod
    def lending(node_id):
        return node(node_id, instances=(LENDS,))

    def clock(self):
        return self.now_s

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    def link(self, node_id):
        cluster = self

        class Link:
            async def stop(self, instance_id, *, at_once=False):
                assert at_once
                cluster.stopped.append((node_id, instance_id))
                if cluster.hangs:
                    await asyncio.Event().wait()
                if node_id in cluster.refusals:
                    raise SollolError(cluster.refusals.pop(node_id))
                cluster.changed(node_id, node(node_id))

        return Link()

    def changed(self, node_id, status):
        self.nodes[node_id] = status
        self.reaper.on_node_changed(node_id)

    def coordinator_dies(self, why=DIED):
        dead = replace(SERVES, state=InstanceState.FAILED, refusal=why)
        self.changed("a", node("a", instances=(dead,)))

    def goes(self, *names, silent_s=LOST_AFTER_S, restarting=False):
        for name in names:
            gone = replace(self.nodes[name], connected=False, report_age_s=silent_s, restarting=restarting)
            self.changed(name, gone)


@pytest.fixture
async def cluster():
    cluster = Cluster()
    running = asyncio.create_task(cluster.reaper.run())
    await asyncio.sleep(0)
    yield cluster
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def ended(cluster, *parts):
    await wait_until(lambda: sorted(cluster.stopped) == sorted(parts), what=f"{parts} are stopped: {cluster.stopped}")


async def test_backends_of_a_dead_coordinator_are_stopped_and_the_pool_is_told_lost(cluster):
    cluster.coordinator_dies()

    await ended(cluster, ("b", POOL), ("c", POOL))
    assert cluster.lost == [(POOL, DIED)]
    assert await cluster.reaper.explained(POOL, OTHER) == DIED


async def test_a_backend_that_its_coordinator_cannot_name_is_named_by_its_own_node_a_moment_later(cluster):
    cluster.hangs = True  # what is left takes its time to end
    cluster.coordinator_dies(UNSURE)
    explained = asyncio.create_task(cluster.reaper.explained(POOL, UNSURE))
    await ended(cluster, ("b", POOL), ("c", POOL))
    assert not explained.done()

    cluster.changed("c", node("c", instances=(replace(LENDS, state=InstanceState.FAILED, refusal=KILLED),)))

    assert KILLED.message in (await explained).message
    assert [why.message for _, why in cluster.lost] == [UNSURE.message, (await explained).message]


async def test_one_that_nobody_names_is_told_as_it_is_after_a_moment(cluster, monkeypatch):
    monkeypatch.setattr(reaping, "EXPLAINED_WITHIN_S", 0.05)
    cluster.coordinator_dies(UNSURE)

    assert await cluster.reaper.explained(POOL, UNSURE) == UNSURE
    assert await cluster.reaper.explained("another pool", UNSURE) == UNSURE


async def test_what_is_certain_is_told_at_once(cluster):
    assert await asyncio.wait_for(cluster.reaper.explained(POOL, OTHER), reaping.EXPLAINED_WITHIN_S / 2) == OTHER


async def test_a_lost_lender_ends_its_coordinator_and_the_other_lender(cluster):
    cluster.goes("b")

    await ended(cluster, ("a", POOL), ("c", POOL))
    assert "node b is lost" in (await cluster.reaper.explained(POOL, OTHER)).message


async def test_what_a_lost_lender_still_runs_is_stopped_when_it_is_back(cluster):
    cluster.goes("b")
    await ended(cluster, ("a", POOL), ("c", POOL))

    cluster.changed("b", cluster.lending("b"))

    await ended(cluster, ("a", POOL), ("b", POOL), ("c", POOL))


async def test_a_lender_that_is_back_soon_has_lost_nothing(cluster):
    cluster.goes("b", silent_s=1.0)
    cluster.reaper._look()
    cluster.changed("b", cluster.lending("b"))
    cluster.reaper._look()

    assert not cluster.lost


async def test_a_lender_whose_agent_said_that_it_is_restarted_has_longer_to_be_back(cluster):
    cluster.goes("b", silent_s=LOST_AFTER_S, restarting=True)
    cluster.reaper._look()
    assert not cluster.lost

    cluster.goes("b", silent_s=LOST_AFTER_RESTART_S, restarting=True)

    await ended(cluster, ("a", POOL), ("c", POOL))


async def test_one_that_stays_away_is_lost_without_any_further_news(cluster, monkeypatch):
    monkeypatch.setattr(reaping, "LOOK_AGAIN_S", 0.02)
    cluster.goes("b", silent_s=1.0)
    looks, look = [], cluster.reaper._look

    def counted():
        looks.append(look())
        return looks[-1]

    monkeypatch.setattr(cluster.reaper, "_look", counted)
    await wait_until(lambda: len(looks) > 2, what="it has been looked at again")
    assert not cluster.lost

    cluster.nodes["b"] = replace(cluster.nodes["b"], report_age_s=LOST_AFTER_S)

    await ended(cluster, ("a", POOL), ("c", POOL))


async def test_a_head_that_was_cut_off_itself_ends_nothing_while_the_nodes_come_back(cluster):
    cluster.goes("a", "b", "c")
    cluster.reaper._look()
    cluster.changed("a", node("a", instances=(SERVES,)))
    cluster.reaper._look()
    assert not cluster.lost

    cluster.now_s = reaping.BACK_WITHIN_S
    cluster.reaper._look()

    assert [pool_id for pool_id, _ in cluster.lost] == [POOL]


async def test_a_stop_that_fails_is_tried_again(cluster, monkeypatch):
    monkeypatch.setattr(reaping, "LOOK_AGAIN_S", 0.02)
    cluster.refusals["b"] = refuse(Reason.AGENT_UNREACHABLE, "gone").refusal
    cluster.coordinator_dies()

    await ended(cluster, ("b", POOL), ("b", POOL), ("c", POOL))


async def test_settled_waits_until_nothing_is_left(cluster):
    await asyncio.wait_for(cluster.reaper.settled(), 1)
    cluster.coordinator_dies()

    await asyncio.wait_for(cluster.reaper.settled(), 1)

    assert sorted(cluster.stopped) == [("b", POOL), ("c", POOL)]


async def test_settled_waits_for_nobody_longer_than_its_bound(cluster, monkeypatch):
    monkeypatch.setattr(reaping, "SETTLED_WITHIN_S", 0.05)
    cluster.hangs = True
    cluster.coordinator_dies()

    await asyncio.wait_for(cluster.reaper.settled(), 1)
