"""The head's view of agents behind real gRPC: who is there, under which address, and what becomes of links."""

import asyncio
import contextlib
from datetime import timedelta

import pytest
from sollol.channels import refusal_abort
from sollol.errors import Reason, Retry, SollolError, refuse
from sollol.registry import RegistryUnavailable
from sollol.report import Instance, InstanceState
from structlog.testing import capture_logs

from sollold import nodes as module
from sollold.agent_link import AgentLink
from sollold.away import LOST_AFTER_RESTART_S, LOST_AFTER_S, is_away
from sollold.nodes import Nodes
from tests.fakes.fake_agent import FakeAgent
from tests.placement_cases import model
from tests.waiting import wait_until


class Board:
    """A registry that lists what the test wants."""

    def __init__(self):
        self.agents = []
        self.up = True
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def addresses(self):
        self.asked += 1
        await self.answers.wait()
        if not self.up:
            raise RegistryUnavailable("down")
        return tuple(agent.report.address for agent in self.agents)


class View:
    def __init__(self, nodes, clock):
        self.nodes, self.clock = nodes, clock

    def connected(self):
        return [status.report.node_id for status in self.nodes.statuses() if status.connected]

    def known(self):
        return [status.report.node_id for status in self.nodes.statuses()]

    async def sees(self, *names):
        await wait_until(lambda: self.connected() == list(names), what=f"exactly {names} connected")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "REGISTRY_POLL_S", 0.05)
    monkeypatch.setattr(module, "RECONNECT_MIN_S", 0.05)
    monkeypatch.setattr(module, "RECONNECT_MAX_S", 0.1)


@pytest.fixture
async def watching(quick):
    async with contextlib.AsyncExitStack() as stack:

        async def started(*static, registry=None):
            now = [0.0]
            nodes = Nodes(registry, static_addresses=static, forget_after_s=60.0, clock=lambda: now[0])
            task = asyncio.create_task(nodes.run())

            async def ended():
                task.cancel()
                await asyncio.wait({task}, timeout=2)
                assert task.done()

            stack.push_async_callback(ended)
            return View(nodes, now)

        yield started


async def test_static_and_registered_agents_are_watched_in_order_of_their_ids(watching, ports):
    board = Board()
    async with FakeAgent("b", ports()).running() as b, FakeAgent("a", ports()).running() as a:
        board.agents = [a]
        view = await watching(b.address, registry=board)

        await view.sees("a", "b")

        assert view.nodes.status("a").report.address == a.address
        assert view.nodes.status("nobody") is None
        assert view.nodes.any_live(8.0)


async def test_every_report_is_told_with_its_nodes_id(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        heard = []
        view.nodes.subscribe(lambda node_id: 1 / 0)
        view.nodes.subscribe(heard.append)
        await view.sees("a")
        before = len(heard)

        a.tell(cordoned=True)

        await wait_until(lambda: len(heard) > before, what="the next report was told, though a listener fails")
        assert set(heard) == {"a"}
        assert view.nodes.status("a").report.cordoned


async def test_a_lost_agent_is_known_until_it_is_back_under_the_same_id(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        await view.sees("a")
        link = view.nodes.link("a")

        await a.stop()
        await view.sees()
        assert view.known() == ["a"]
        await a.start()

        await view.sees("a")
        assert view.nodes.link("a") is link, "streams and watch share one channel, which redials"


async def test_an_agent_that_moved_is_reached_at_its_new_address_and_the_old_one_is_let_go(watching, ports):
    board = Board()
    old, new = FakeAgent("a", ports()), FakeAgent("a", ports(), boot_id="next")
    async with old.running(), new.running():
        board.agents = [old]
        view = await watching(registry=board)
        await view.sees("a")

        await old.stop()
        board.agents = [new]

        await wait_until(lambda: view.nodes.link("a").address == new.address, what="the new address")
        await wait_until(lambda: list(view.nodes._watches) == [new.address], what="the old one is not dialled")
        await wait_until(lambda: not view.nodes._ending, what="and its channel is closed")


async def test_another_agent_at_the_same_address_keeps_its_watch_when_the_former_is_forgotten(watching, ports):
    async with FakeAgent("former", ports()).running() as agent:
        view = await watching(agent.address)
        await view.sees("former")
        await agent.stop()
        await view.sees()
        agent.tell(node_id="latter")
        await agent.start()
        await view.sees("latter")
        link = view.nodes.link("latter")

        view.clock[0] = 61.0

        await wait_until(lambda: view.known() == ["latter"], what="the former is forgotten")
        agent.tell(cordoned=True)
        await wait_until(lambda: view.nodes.status("latter").report.cordoned, what="still watched")
        assert view.nodes.link("latter") is link


def second_ones(view):
    """Grows with every report that comes from a second agent of a known node."""
    seen, twin = [], view.nodes._twin

    def looked_at(*given):
        seen.append(given)
        return twin(*given)

    view.nodes._twin = looked_at
    return seen


async def test_a_second_node_of_the_same_id_is_refused_and_the_first_untouched(watching, ports):
    first, second = FakeAgent("a", ports()), FakeAgent("a", ports(), boot_id="other machine")
    async with first.running(), second.running():
        with capture_logs() as logs:
            view = await watching(first.address)
            await view.sees("a")
            seen = second_ones(view)
            view.nodes._static = (first.address, second.address)
            await wait_until(lambda: second.told, what="the second is watched, and told")
            for _ in range(3):
                before = len(seen)
                second.tell(cordoned=True)
                await wait_until(lambda before=before: len(seen) > before, what="the second is heard")
                first.tell()
                await wait_until(
                    lambda: view.nodes.status("a").report.sequence == first.report.sequence, what="the first is heard"
                )

        assert view.nodes.link("a").address == first.address
        assert not view.nodes.status("a").report.cordoned
        complaints = [entry for entry in logs if entry["event"] == "node_id_in_use"]
        assert len(complaints) == 1, "once, not with every report"
        assert complaints[0]["second"] == second.address
        assert second.told == [Reason.NODE_ID_IN_USE]
        assert not first.told


@pytest.mark.parametrize(("token", "told"), [("x", []), ("y", [Reason.NODE_ID_IN_USE])])
async def test_an_agent_is_the_same_by_its_token_wherever_it_is(watching, ports, token, told):
    first, second = FakeAgent("a", ports()), FakeAgent("a", ports())
    first.tell(agent_token="x")
    second.tell(agent_token=token)
    async with first.running(), second.running():
        view = await watching(first.address)
        await view.sees("a")
        seen = second_ones(view)
        view.nodes._static = (first.address, second.address)
        await wait_until(lambda: seen, what="the second is watched")
        second.tell()
        await wait_until(lambda: len(seen) > 1, what="the second is heard")
        first.tell()
        await wait_until(
            lambda: view.nodes.status("a").report.sequence == first.report.sequence, what="the first is heard"
        )
        await wait_until(lambda: second.told == told, what="the second is told, or not")
        assert not first.told


async def test_one_agent_under_two_names_is_no_conflict(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        with capture_logs() as logs:
            view = await watching(a.address, a.address.replace("127.0.0.1", "localhost"))
            await wait_until(lambda: a.watchers == 2, what="watched under both names")
            a.tell()
            await view.sees("a")

        assert not [entry for entry in logs if entry["event"] == "node_id_in_use"]


async def test_losing_the_registry_hides_no_node_and_its_return_goes_on(watching, ports):
    board = Board()
    async with FakeAgent("a", ports()).running() as a, FakeAgent("b", ports()).running() as b:
        board.agents = [a]
        view = await watching(registry=board)
        await view.sees("a")

        board.up = False
        asked = board.asked
        await wait_until(lambda: board.asked > asked + 2, what="asked in vain")
        a.tell(cordoned=True)
        await wait_until(lambda: view.nodes.status("a").report.cordoned, what="still watched")
        board.agents, board.up = [a, b], True

        await view.sees("a", "b")


async def test_a_registry_that_does_not_answer_keeps_nobody_from_the_agents_that_are_known(watching, ports):
    board = Board()
    board.answers.clear()
    async with FakeAgent("a", ports()).running() as a, FakeAgent("b", ports()).running() as b:
        board.agents = [b]
        view = await watching(a.address, registry=board)

        await view.sees("a")
        assert board.asked == 1
        await a.stop()
        await view.sees()
        view.clock[0] = 61.0
        await wait_until(lambda: not view.known(), what="the lost one is forgotten meanwhile")

        board.answers.set()
        await view.sees("b")


async def test_a_new_head_knows_whether_it_has_heard_everybody(watching, ports):
    board = Board()
    board.answers.clear()
    async with FakeAgent("a", ports()).running() as a:
        late = FakeAgent("late", ports())
        board.agents = [late]
        view = await watching(a.address, registry=board)
        await view.sees("a")
        assert not view.nodes.all_heard(), "the registry may know more"

        board.answers.set()
        await wait_until(lambda: len(view.nodes._watches) == 2, what="it does")
        assert not view.nodes.all_heard()
        async with late.running():
            await view.sees("a", "late")
            assert view.nodes.all_heard()


async def test_an_agent_that_does_not_answer_is_soon_waited_for_no_more(watching, ports):
    view = await watching(FakeAgent("gone", ports()).address)
    await wait_until(lambda: view.nodes._watches, what="it is dialled")
    assert not view.nodes.all_heard()

    view.clock[0] = module.HEARD_WITHIN_S

    assert view.nodes.all_heard()


async def test_a_registry_that_comes_back_empty_hides_no_node(watching, ports):
    board = Board()
    async with FakeAgent("a", ports()).running() as a:
        board.agents = [a]
        view = await watching(registry=board)
        await view.sees("a")

        board.agents = []
        asked = board.asked
        await wait_until(lambda: board.asked > asked + 2, what="read again")

        await view.sees("a")


async def test_a_silent_node_is_forgotten_and_found_again_when_it_is_back(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        heard = []
        view.nodes.subscribe(heard.append)
        await view.sees("a")
        version = view.nodes.models_version
        await a.stop()
        await view.sees()
        heard.clear()

        view.clock[0] = 61.0
        await wait_until(lambda: not view.known(), what="forgotten")
        assert heard == ["a"]
        assert view.nodes.models_version != version
        with pytest.raises(SollolError) as caught:
            view.nodes.link("a")
        await a.start()

        await view.sees("a")
        assert caught.value.refusal.reason is Reason.AGENT_UNREACHABLE


async def test_a_node_that_is_not_back_in_time_is_told_of_again(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        heard = []
        view.nodes.subscribe(heard.append)
        await view.sees("a")
        await a.stop()
        await view.sees()
        heard.clear()

        view.clock[0] = LOST_AFTER_S

        await wait_until(lambda: heard == ["a"], what="it is lost")
        await wait_until(lambda: not view.nodes._nodes["a"].away, what="once")


async def test_an_agent_that_says_it_is_restarted_is_waited_for_longer_than_one_that_says_nothing(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        await view.sees("a")
        a.refusals["WatchReport"] = refuse(Reason.AGENT_RESTARTING, "ask again", retryable=True).refusal

        a.tell()
        await view.sees()
        view.clock[0] = LOST_AFTER_RESTART_S - 1
        assert view.nodes.status("a").restarting
        assert is_away(view.nodes.status("a"))
        view.clock[0] = LOST_AFTER_RESTART_S
        assert not is_away(view.nodes.status("a"))

        a.refusals.clear()
        await view.sees("a")
        assert not view.nodes.status("a").restarting
        await a.stop()
        await view.sees()
        view.clock[0] += LOST_AFTER_S
        assert not is_away(view.nodes.status("a"))


async def test_models_change_their_version_only_when_they_change(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        await view.sees("a")
        version, models = view.nodes.models_version, view.nodes.status("a").report.models

        async def reported(**changes):
            a.tell(**changes)
            await wait_until(
                lambda: view.nodes.status("a").report.sequence == a.report.sequence and view.connected(), what="heard"
            )

        await reported()
        await a.stop()
        await view.sees()
        await a.start()
        await reported()
        assert view.nodes.models_version == version
        assert view.nodes.status("a").report.models is models

        await reported(models=(model("new"),))

        assert view.nodes.models_version != version


async def test_nodes_with_the_same_file_share_its_shape(watching, ports):
    async with FakeAgent("a", ports()).running() as a, FakeAgent("b", ports()).running() as b:
        view = await watching(a.address, b.address)
        await view.sees("a", "b")

        first, second = (view.nodes.status(name).report.models[0] for name in "ab")

        assert first.shape is second.shape


async def test_an_agent_nobody_understands_is_told_of_once_and_asked_again(watching, ports):
    async with FakeAgent("a", ports()).running() as a:

        async def newer(context):
            await context.write(module_response())

        a.hooks["WatchReport"] = newer
        with capture_logs() as logs:
            view = await watching(a.address)
            await wait_until(lambda: len(a.pools("WatchReport")) > 2, what="asked again")
        a.hooks.clear()

        await view.sees("a")
        told = [entry for entry in logs if entry["event"] == "agent_not_watched"]
        assert len(told) == 1
        assert "same version" in told[0]["problem"]


def module_response():
    from sollol.v1 import agent_pb2, common_pb2

    device = common_pb2.Device(device_id="CPU", kind=99)
    return agent_pb2.WatchReportResponse(report=common_pb2.Report(node_id="a", devices=[device]))


async def test_ending_closes_every_channel(watching, ports):
    async with FakeAgent("a", ports()).running() as a:
        view = await watching(a.address)
        await view.sees("a")
        watches = list(view.nodes._watches.values())
        link = view.nodes.link("a")
        for task in watches:
            task.cancel()
        await asyncio.wait(watches)

        with pytest.raises(SollolError) as caught:
            await link.stop("p")

        assert caught.value.refusal.reason is Reason.AGENT_UNREACHABLE


class TestLink:
    """Whatever a call ends in is a refusal; only our own cancellation is one."""

    @pytest.fixture
    async def pair(self, ports):
        async with FakeAgent("a", ports()).running() as agent:
            link = AgentLink(agent.address)
            yield agent, link
            await link.close()

    async def test_a_call_that_the_other_side_cancels_is_no_cancellation_of_ours(self, pair):
        """It would end a task that nobody cancelled, and those who wait for it would wait for ever."""
        agent, link = pair

        async def cancel(context):
            import grpc

            await context.abort(grpc.StatusCode.CANCELLED, "gone")

        agent.hooks["Stop"] = agent.hooks["WatchInstance"] = cancel

        with pytest.raises(SollolError) as unary:
            await link.stop("p")
        with pytest.raises(SollolError) as stream:
            await anext(link.watch_instance("p"))

        assert unary.value.refusal.reason is stream.value.refusal.reason is Reason.AGENT_UNREACHABLE

    async def test_a_channel_closed_in_mid_call_is_a_refusal(self, pair):
        agent, link = pair
        agent.hooks["Reserve"] = lambda _: asyncio.Event().wait()
        call = asyncio.create_task(link.reserve("p", {"CPU": 1}, timedelta(seconds=1)))
        await wait_until(lambda: agent.pools("Reserve"), what="asked")

        await link.close()
        await asyncio.wait({call})

        assert call.exception().refusal.reason is Reason.AGENT_UNREACHABLE

    async def test_our_own_cancellation_stays_one(self, pair):
        agent, link = pair
        agent.hooks["Reserve"] = lambda _: asyncio.Event().wait()
        call = asyncio.create_task(link.reserve("p", {"CPU": 1}, timedelta(seconds=1)))
        await wait_until(lambda: agent.pools("Reserve"), what="asked")

        call.cancel()
        await asyncio.wait({call})

        assert call.cancelled()

    async def test_refusals_come_through_as_values_and_as_status(self, pair):
        agent, link = pair
        agent.refusals["Reserve"] = refuse(Reason.MEMORY_SHORT, "short", retryable=True, numbers={"free": 3}).refusal
        agent.refusals["TailLog"] = refuse(Reason.INSTANCE_NOT_FOUND, "none").refusal

        async def abort(context):
            await refusal_abort(context, refuse(Reason.STALE_REPORT, "later").refusal)

        agent.hooks["Stop"] = abort

        with pytest.raises(SollolError) as reserve:
            await link.reserve("p", {"CPU": 1}, timedelta(seconds=1))
        with pytest.raises(SollolError) as stop:
            await link.stop("p")
        with pytest.raises(SollolError) as tail:
            await anext(link.tail_log("p", lines=5, follow=False))

        assert (reserve.value.refusal.retry, reserve.value.refusal.numbers) == (Retry.RETRYABLE, {"free": 3})
        assert stop.value.refusal.reason is Reason.STALE_REPORT
        assert tail.value.refusal.reason is Reason.INSTANCE_NOT_FOUND

    async def test_instances_and_log_lines_are_values(self, pair):
        from tests.supervised import plan_of

        _agent, link = pair
        await link.reserve("p", {"CPU": 1}, timedelta(seconds=1))
        started = await link.start_coordinator("p", plan_of("m"))
        states = [instance.state async for instance in link.watch_instance("p")]

        assert isinstance(started, Instance)
        assert states == [InstanceState.STARTING, InstanceState.READY]
        assert [lines async for lines in link.tail_log("p", lines=5, follow=False)] == [("5 lines of p",)]

    async def test_nobody_there_is_unreachable_and_names_the_address(self, ports):
        link = AgentLink(f"127.0.0.1:{ports()}")

        with pytest.raises(SollolError) as caught:
            await link.stop("p")
        await link.close()

        assert caught.value.refusal.reason is Reason.AGENT_UNREACHABLE
        assert link.address in caught.value.refusal.message
