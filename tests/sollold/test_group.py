"""A pool's parts on its nodes: what each reserves and lends, who is to blame for a failure, and what dead pools leave."""

import asyncio
from datetime import timedelta

import pytest
from msgspec.structs import replace
from sollol.errors import SUSPECTED_BACKENDS, Reason, Refusal, SollolError, refuse
from sollol.report import (
    BackendEndpoint,
    CoordinatorPlan,
    DeviceShare,
    Instance,
    InstanceKind,
    InstanceState,
    Reservation,
    RpcTransport,
)

from sollold import group
from sollold.group import NodeRefusedError, Part, at_fault, losses, parts_of, remains
from tests.placement_cases import node

POOL = "pool-1"
TTL = timedelta(seconds=5)


def plan_of(*shares: DeviceShare) -> CoordinatorPlan:
    return CoordinatorPlan(model="m", parallel=1, context_per_slot=512, shares=shares)


def share(node_id: str, device_id: str, layers: int, total_bytes: int) -> DeviceShare:
    return DeviceShare(node_id=node_id, device_id=device_id, layers=layers, total_bytes=total_bytes)


def instance(state: InstanceState, *, pool: str = POOL, lends: bool = True) -> Instance:
    kind = InstanceKind.BACKEND if lends else InstanceKind.COORDINATOR
    instance_id = f"{pool}.backend" if lends else pool
    return Instance(instance_id=instance_id, pool_id=pool, model="", state=state, kind=kind)


class Scripted:
    """An agent that answers at once, perhaps with a refusal."""

    def __init__(self, refusal: Refusal | None = None) -> None:
        self.refusal = refusal
        self.reserved: dict[str, dict[str, int]] = {}
        self.lent: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self.expected: dict[str, int] = {}

    async def _answer(self):
        if self.refusal is not None:
            raise SollolError(self.refusal)

    async def reserve(self, pool_id, bytes_by_device, ttl):
        await self._answer()
        self.reserved[pool_id] = dict(bytes_by_device)

    async def start_backend(
        self, pool_id, device_ids, *, allowed_hosts, attach_within_s, upload_bytes, coordinator_node, pool_secret
    ):
        await self._answer()
        self.expected[pool_id] = upload_bytes
        self.lent[pool_id] = (tuple(device_ids), tuple(allowed_hosts))
        return BackendEndpoint(node_id="", host="10.0.0.9", port=7500, device_ids=tuple(device_ids))


class RoomForOne:
    """An agent that takes a moment to answer and has room for a single pool."""

    def __init__(self):
        self.holder = None

    async def reserve(self, pool_id, _bytes_by_device, _ttl):
        await asyncio.sleep(0)
        if self.holder is not None:
            raise refuse(Reason.MEMORY_SHORT, f"{self.holder} has it", retryable=True)
        self.holder = pool_id
        await asyncio.sleep(0)


class TestParts:
    def test_the_coordinators_part_comes_first_and_the_lenders_in_the_order_of_the_layers(self):
        plan = plan_of(share("", "CPU", 0, 10), share("c", "CPU", 3, 20), share("b", "CUDA0", 5, 30))

        parts = parts_of(plan, "a")

        assert [part.node_id for part in parts] == ["a", "c", "b"]
        assert [part.bytes for part in parts] == [{"CPU": 10}, {"CPU": 20}, {"CUDA0": 30}]
        assert [part.lent for part in parts] == [[], ["CPU"], ["CUDA0"]]

    def test_what_the_coordinators_cpu_hosts_and_what_it_lends_is_reserved_as_one_sum(self):
        """Its ledger knows one reservation per pool, and two promises on one device must both be kept."""
        plan = plan_of(share("", "CPU", 0, 100), share("b", "CPU", 4, 20), share("a", "CPU", 5, 300))

        own, _ = parts_of(plan, "a")

        assert own.bytes == {"CPU": 400}
        assert own.lent == ["CPU"]

    def test_a_lender_with_a_host_share_reserves_it_and_lends_only_what_holds_layers(self):
        plan = plan_of(share("", "CPU", 0, 1), share("b", "CPU", 0, 2), share("b", "CUDA0", 9, 50))

        (_, lender) = parts_of(plan, "a")

        assert lender.bytes == {"CPU": 2, "CUDA0": 50}
        assert lender.lent == ["CUDA0"]

    def test_what_lent_gpus_take_of_their_nodes_ram_is_reserved_once_beside_what_its_cpu_lends(self):
        lent = [replace(share("b", f"CUDA{at}", 3, 50), host_bytes=7) for at in range(2)]
        alone, both = (
            plan_of(share("", "CPU", 0, 1), *lent),
            plan_of(share("", "CPU", 0, 1), *lent, share("b", "CPU", 2, 9)),
        )

        assert parts_of(alone, "a")[1].bytes == {"CUDA0": 50, "CUDA1": 50, "CPU": 7}
        assert parts_of(alone, "a")[1].lent == ["CUDA0", "CUDA1"]
        assert parts_of(both, "a")[1].bytes == {"CUDA0": 50, "CUDA1": 50, "CPU": 16}

    def test_a_lender_is_sent_the_weights_of_what_it_lends_also_on_the_coordinators_own_node(self):
        shares = [share("", "CPU", 0, 9), share("b", "CPU", 3, 9), share("b", "CUDA0", 2, 9), share("a", "CPU", 4, 9)]
        plan = plan_of(*(replace(each, weight_bytes=10**at) for at, each in enumerate(shares)))

        assert [(part.node_id, part.upload_bytes) for part in parts_of(plan, "a")] == [("a", 1000), ("b", 110)]

    def test_a_plan_on_one_node_lends_nothing(self):
        (own,) = parts_of(plan_of(share("", "CPU", 4, 10), share("", "CUDA0", 5, 20)), "a")

        assert own == Part("a", {"CPU": 10, "CUDA0": 20}, [])


class TestReserveAndStart:
    PARTS = (Part("a", {"CPU": 10}), Part("b", {"CPU": 20}, ["CPU"], 15), Part("c", {"CPU": 30}, ["CPU"], 25))

    async def test_every_node_reserves_its_own_part(self):
        agents = {name: Scripted() for name in "abc"}

        await group.reserve(self.PARTS, POOL, TTL, agents.__getitem__)

        assert [agents[name].reserved[POOL] for name in "abc"] == [{"CPU": 10}, {"CPU": 20}, {"CPU": 30}]

    async def test_a_refusal_names_its_node_and_those_behind_it_are_not_asked(self):
        no = refuse(Reason.MEMORY_SHORT, "short", numbers={"needed_bytes": 20, "free_bytes": 1}).refusal
        agents = {"a": Scripted(), "b": Scripted(no), "c": Scripted()}

        with pytest.raises(NodeRefusedError) as caught:
            await group.reserve(self.PARTS, POOL, TTL, agents.__getitem__)

        assert (caught.value.node_id, caught.value.refusal) == ("b", no)
        assert agents["a"].reserved
        assert not agents["c"].reserved

    async def test_of_groups_that_race_for_the_same_nodes_one_gets_them_all(self):
        """Whoever coordinates: were each to begin with its own node, each would keep the other from the rest."""
        agents = {name: RoomForOne() for name in "abc"}
        groups = [tuple(Part(name, {"CPU": 1}) for name in order) for order in ("abc", "bca", "cab")]

        ends = await asyncio.gather(
            *(group.reserve(parts, f"pool-{at}", TTL, agents.__getitem__) for at, parts in enumerate(groups)),
            return_exceptions=True,
        )

        assert ends.count(None) == 1
        assert {agent.holder for agent in agents.values()} == {f"pool-{ends.index(None)}"}

    async def test_only_lenders_start_a_backend_and_each_admits_the_coordinators_host_alone(self):
        agents = {name: Scripted() for name in "abc"}

        endpoints = await group.start_backends(self.PARTS, POOL, "10.0.0.1", agents.__getitem__, b"")

        assert [endpoint.node_id for endpoint in endpoints] == ["b", "c"]
        assert not agents["a"].lent
        assert agents["b"].lent[POOL] == (("CPU",), ("10.0.0.1",))
        assert [agents[name].expected for name in "abc"] == [{}, {POOL: 15}, {POOL: 25}]

    async def test_a_backend_that_does_not_start_is_its_nodes_refusal(self):
        agents = {"a": Scripted(), "b": Scripted(), "c": Scripted(refuse(Reason.PORT_TAKEN, "all taken").refusal)}

        with pytest.raises(NodeRefusedError) as caught:
            await group.start_backends(self.PARTS, POOL, "10.0.0.1", agents.__getitem__, b"")

        assert (caught.value.node_id, caught.value.refusal.reason) == ("c", Reason.PORT_TAKEN)

    async def test_a_bug_in_one_call_is_not_taken_for_a_refusal(self):
        class Broken(Scripted):
            async def reserve(self, *_args):
                raise ZeroDivisionError

        agents = {"a": Scripted(), "b": Broken(), "c": Scripted()}

        with pytest.raises(ZeroDivisionError):
            await group.reserve(self.PARTS, POOL, TTL, agents.__getitem__)


class TestAtFault:
    PARTS = (Part("a", {"CPU": 1}), Part("b", {"CPU": 1}, ["CPU"]), Part("c", {"CPU": 1}, ["CPU"]))
    DIED = refuse(Reason.ENGINE_DIED, "it aborted").refusal
    LENDS = instance(InstanceState.READY)

    @pytest.mark.parametrize("reason", [Reason.ENGINE_DIED, Reason.ENGINE_STALLED, Reason.ENGINE_START_FAILED])
    @pytest.mark.parametrize("state", [InstanceState.FAILED, InstanceState.STOPPED, InstanceState.BACKOFF])
    def test_a_lender_whose_backend_is_over_is_the_one_to_leave_out(self, reason, state):
        statuses = [node("a"), node("b", instances=(self.LENDS,)), node("c", instances=(instance(state),))]

        assert at_fault(refuse(reason, "x").refusal, POOL, self.PARTS, statuses) == "c"

    def test_so_is_one_that_reports_no_backend_one_that_is_disconnected_and_one_that_is_forgotten(self):
        well = node("c", instances=(self.LENDS,))
        cut_off = replace(node("b", instances=(self.LENDS,)), connected=False)

        for statuses in ([node("a"), node("b"), well], [node("a"), cut_off, well], [node("a"), well]):
            assert at_fault(self.DIED, POOL, self.PARTS, statuses) == "b"

    def test_another_pools_backend_on_the_node_does_not_speak_for_it(self):
        other = instance(InstanceState.READY, pool="pool-2")
        statuses = [node("a"), node("b", instances=(other,)), node("c", instances=(self.LENDS,))]

        assert at_fault(self.DIED, POOL, self.PARTS, statuses) == "b"

    def test_the_coordinators_node_is_when_all_backends_live(self):
        statuses = [node("a"), *(node(name, instances=(self.LENDS,)) for name in "bc")]

        assert at_fault(self.DIED, POOL, self.PARTS, statuses) == "a"

    def test_a_refusal_that_says_nothing_of_backends_is_the_coordinators_own(self):
        statuses = [node("a"), node("b"), node("c")]

        assert at_fault(refuse(Reason.MODEL_CORRUPT, "x").refusal, POOL, self.PARTS, statuses) == "a"


class TestLosses:
    """A pool whose coordinator is on a, with layers on b and c."""

    LENDS = instance(InstanceState.READY)

    def cluster(self, state=InstanceState.READY, b=InstanceState.READY, **coordinator):
        shares = tuple(share(node_id, "CPU", 4, 1) for node_id in ("", "b", "c"))
        serves = replace(instance(state, lends=False), shares=shares, **coordinator)
        return [node("a", instances=(serves,)), node("b", instances=(instance(b),)), node("c", instances=(self.LENDS,))]

    @pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING])
    def test_a_pool_with_all_its_parts_is_not_lost(self, state):
        assert losses(self.cluster(state), lost_nodes=()) == {}

    def test_one_whose_coordinator_failed_is_and_its_agent_said_why(self):
        died = refuse(Reason.ENGINE_DIED, "it aborted").refusal

        assert losses(self.cluster(InstanceState.FAILED, refusal=died), lost_nodes=()) == {POOL: died}

    @pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.READY])
    @pytest.mark.parametrize("lost", ["a", "b", "c"])
    def test_one_that_has_a_part_on_a_lost_node_is_and_the_node_is_named(self, state, lost):
        why = losses(self.cluster(state), lost_nodes=(lost,))[POOL]

        assert why.reason is (Reason.AGENT_UNREACHABLE if lost == "a" else Reason.ENGINE_DIED)
        assert f"node {lost} is lost" in why.message

    def test_one_whose_backend_has_ended_is_though_its_coordinator_does_not_know_yet(self):
        assert "backend on b" in losses(self.cluster(b=InstanceState.FAILED), lost_nodes=())[POOL].message

    def test_a_pool_whose_coordinator_is_about_to_be_ended_is_on_one_node_too(self):
        """It holds its memory until then: the next plan must not be made before."""
        stalled = refuse(Reason.ENGINE_STALLED, "it was stopped").refusal
        alone = replace(instance(InstanceState.LOST, lends=False), refusal=stalled)

        assert losses(self.cluster(InstanceState.LOST, refusal=stalled), lost_nodes=()) == {POOL: stalled}
        assert losses([node("a", instances=(alone,))], lost_nodes=()) == {POOL: stalled}
        assert remains([node("a", instances=(alone,))], {POOL}) == (("a", POOL),)

    def test_a_coordinator_that_cannot_name_its_lost_backend_is_believed_less_than_the_backends_own_node(self):
        unsure = refuse(Reason.ENGINE_DIED, "on b or c", numbers={SUSPECTED_BACKENDS: 2}).refusal
        killed = refuse(Reason.ENGINE_DIED, "the backend on c ended (SIGKILL)").refusal
        a, b, c = self.cluster(InstanceState.FAILED, refusal=unsure)

        assert losses([a, b, c], lost_nodes=()) == {POOL: unsure}
        c = node("c", instances=(replace(instance(InstanceState.FAILED), refusal=killed),))
        assert killed.message in losses([a, b, c], lost_nodes=())[POOL].message
        assert "node b is lost" in losses([a, b, c], lost_nodes=("b",))[POOL].message

    def test_a_backend_that_is_not_reported_yet_is_not_missed(self):
        a, _, c = self.cluster()

        assert losses([a, node("b"), c], lost_nodes=()) == {}

    def test_a_pool_of_which_no_node_can_be_asked_is_left_alone(self):
        """It may be well, and it is this head that is cut off."""
        assert losses(self.cluster(), lost_nodes=("a", "b", "c")) == {}

    def test_a_pool_on_one_node_has_nothing_elsewhere_to_end(self):
        assert losses([node("a", instances=(instance(InstanceState.FAILED, lends=False),))], lost_nodes=()) == {}


class TestRemains:
    LENDS = instance(InstanceState.READY)

    def test_every_process_and_every_reservation_of_a_lost_pool_remains(self):
        both = node("a", instances=(instance(InstanceState.READY, lends=False), self.LENDS))
        bare = node("b")
        held = (Reservation(pool_id=POOL, bytes={"CPU": 1}),)
        reserved = replace(bare, report=replace(bare.report, reservations=held))

        assert remains([both, reserved], {POOL}) == (("a", POOL), ("b", POOL))

    def test_other_pools_do_not(self):
        assert remains([node("a", instances=(self.LENDS,))], {"pool-2"}) == ()

    def test_what_is_over_and_nodes_out_of_reach_are_left_alone(self):
        statuses = [
            node("a", instances=(instance(InstanceState.FAILED, lends=False),)),
            node("b", instances=(instance(InstanceState.STOPPED),)),
            replace(node("c", instances=(self.LENDS,)), connected=False),
        ]

        assert remains(statuses, {POOL}) == ()


class TestSecrets:
    """Whose bytes travel through a tunnel, and who may let them in."""

    PARTS = (group.Part("a", lent=["CPU"]), group.Part("b", lent=["CPU"]))
    TUNNEL, DIRECT = RpcTransport.TUNNEL, RpcTransport.DIRECT

    async def test_each_pool_has_a_secret_of_its_own_that_only_other_nodes_and_the_coordinator_get(self):
        shown = []
        for _ in range(2):
            agents = {name: SecretKeeper(name) for name in ("a", "b")}
            plan = CoordinatorPlan(model="m", parallel=1, context_per_slot=1, shares=())
            at = agents.__getitem__
            await group.start(self.PARTS, POOL, plan, "10.0.0.1", at, transport=self.TUNNEL)
            assert agents["a"].secret == b""
            assert len(agents["b"].secret) == 32
            assert agents["a"].plan.pool_secret == agents["b"].secret
            assert [(agents[name].coordinator) for name in "ab"] == ["a", "a"]
            shown.append(agents["b"].secret)
        assert shown[0] != shown[1]

    async def test_without_tunnels_there_is_no_secret(self):
        agents = {name: SecretKeeper(name, tunnelled=False) for name in ("a", "b")}
        plan = CoordinatorPlan(model="m", parallel=1, context_per_slot=1, shares=())
        await group.start(self.PARTS, POOL, plan, "10.0.0.1", agents.__getitem__, transport=self.DIRECT)
        assert (agents["b"].secret, agents["a"].plan.pool_secret) == (b"", b"")


class SecretKeeper:
    """An agent that remembers what it was told of a pool's secret."""

    def __init__(self, node_id, *, tunnelled=True):
        self.node_id, self.tunnelled = node_id, tunnelled

    async def start_backend(self, pool_id, device_ids, *, coordinator_node, pool_secret, **_):
        self.coordinator, self.secret = coordinator_node, pool_secret
        tunnelled = self.tunnelled and bool(pool_secret)
        return BackendEndpoint(
            node_id=self.node_id, host="h", port=1, device_ids=tuple(device_ids), tunnelled=tunnelled
        )

    async def start_coordinator(self, pool_id, plan):
        self.plan = plan
