import asyncio
from contextlib import AsyncExitStack

import grpc.aio
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sollol import wire
from sollol.channels import new_server, refusal_of
from sollol.errors import Reason, Refusal, refuse
from sollol.link import Link
from sollol.report import (
    BackendEndpoint,
    CoordinatorPlan,
    Device,
    DeviceKind,
    DeviceShare,
    Instance,
    InstanceState,
    Model,
    Report,
    Reservation,
)
from sollol.v1 import agent_pb2, common_pb2

from agent.cordon import Cordon
from agent.link_probe import Sink
from agent.server import AgentService
from tests.relays import agent_stub
from tests.waiting import wait_until

PLAN = CoordinatorPlan(
    model="tiny",
    parallel=2,
    context_per_slot=512,
    shares=(DeviceShare(device_id="CPU", layers=3, weight_bytes=60, kv_bytes=30, margin_bytes=10, total_bytes=100),),
)
TUNNELLED = BackendEndpoint(node_id="b", host="10.0.0.2", port=7501, device_ids=("CPU",), tunnelled=True)


class MemoryReporter:
    def __init__(self):
        cpu = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=1000, free_bytes=1000)
        self.report = Report(node_id="n1", host="127.0.0.1", port=7462, devices=(cpu,), sequence=1)
        self.changes = 0
        self._news = asyncio.Condition()

    def current(self):
        return self.report

    async def watch(self):
        while True:
            report = self.report
            yield report
            async with self._news:
                await self._news.wait_for(lambda: self.report is not report)  # noqa: B023 - waited for right here

    def changed(self):
        self.changes += 1

    async def publish(self, **changes):
        async with self._news:
            self.report = msgspec.structs.replace(self.report, sequence=self.report.sequence + 1, **changes)
            self._news.notify_all()


class MemoryLedger:
    def __init__(self):
        self.held, self.bound = {}, set()

    def reserve(self, pool_id, bytes_by_device, ttl_s, devices):
        if sum(bytes_by_device.values()) > devices[0].free_bytes:
            return Refusal(reason=Reason.MEMORY_SHORT, message="no", numbers={"needed_bytes": 1})
        self.held[pool_id] = dict(bytes_by_device)
        return None

    def release(self, pool_id):
        if pool_id not in self.bound:
            self.held.pop(pool_id, None)

    def bind(self, pool_id, instance_id):
        if pool_id not in self.held:
            raise refuse(Reason.RESERVATION_MISSING, "lapsed", retryable=True)
        self.bound.add(pool_id)
        return self.held[pool_id]

    def freed(self, pool_id, instance_id):
        self.bound.discard(pool_id)
        self.held.pop(pool_id, None)

    def reservations(self):
        return tuple(Reservation(pool_id=pool, bytes=held) for pool, held in self.held.items())


class MemorySupervisor:
    def __init__(self, log_dir):
        self.running, self.starts, self.wishes, self.log_dir = {}, [], [], log_dir
        self.fail_with = None

    async def start(self, pool_id, plan):
        self.starts.append(plan)
        if self.fail_with is not None:
            raise self.fail_with
        self.running[pool_id] = Instance(instance_id=pool_id, model=plan.model, state=InstanceState.STARTING)
        return self.running[pool_id]

    async def start_backend(self, wish):
        self.wishes.append(wish)
        if self.fail_with is not None:
            raise self.fail_with
        name = f"{wish.pool_id}.backend"
        self.running[name] = Instance(instance_id=name, pool_id=wish.pool_id, model="", state=InstanceState.READY)
        return BackendEndpoint(node_id="n1", host="127.0.0.1", port=7500, device_ids=wish.device_ids)

    async def watch(self, instance_id):
        if instance_id not in self.running:
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no {instance_id}")
        for percent, state in ((0.0, InstanceState.STARTING), (50.0, InstanceState.STARTING), (100.0, "READY")):
            yield msgspec.structs.replace(self.running[instance_id], percent=percent, state=InstanceState(state))

    async def stop(self, instance_id, *, at_once=False):
        self.running.pop(instance_id, None)

    def instances(self):
        return tuple(self.running.values())

    def log_path(self, instance_id):
        if not (self.log_dir / instance_id).exists():
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no {instance_id}")
        return self.log_dir / instance_id


class NoRelay:
    async def serve(self, context):
        await context.read()


class MemoryLinks:
    def __init__(self):
        self.asked, self.fail_with = [], None

    async def measure(self, node_id, host, port):
        self.asked.append((node_id, host, port))
        if self.fail_with is not None:
            raise self.fail_with
        return Link(node_id=node_id, rtt_s=0.001, bytes_per_s=1e6, boot_id="boot")


class Node:
    def __init__(self, tmp_path):
        self.links = MemoryLinks()
        self.cordon, self.active = Cordon(tmp_path), {}
        self.reporter, self.ledger, self.supervisor = MemoryReporter(), MemoryLedger(), MemorySupervisor(tmp_path)
        self.service = AgentService(
            reporter=self.reporter,
            ledger=self.ledger,
            supervisor=self.supervisor,
            relay=NoRelay(),
            links=self.links,
            sink=Sink(),
            cordon=self.cordon,
            active_streams=lambda instance_id: self.active.get(instance_id, 0),
        )


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


@pytest.fixture
async def stack():
    async with AsyncExitStack() as entered:
        yield entered


@pytest.fixture
async def address(node, stack, tmp_path):
    server = new_server()
    node.service.add_to(server)
    server.add_insecure_port(f"unix:{tmp_path}/agent.sock")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return f"unix:{tmp_path}/agent.sock"


@pytest.fixture
async def stub(stack, address):
    return await stack.enter_async_context(agent_stub(address))


def reason(refusal):
    return common_pb2.Reason.Name(refusal.reason).removeprefix("REASON_")


def reserve(stub, pool_id="p1", size=100, ttl_s=30.0, device="CPU"):
    return stub.Reserve(agent_pb2.ReserveRequest(pool_id=pool_id, bytes={device: size}, ttl_s=ttl_s))


def start(stub, plan=PLAN, pool_id="p1"):
    request = agent_pb2.StartCoordinatorRequest(pool_id=pool_id)
    wire.fill(request.plan, plan)
    return stub.StartCoordinator(request)


async def status_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def test_the_newest_report_is_returned(node, stub):
    response = await stub.GetReport(agent_pb2.GetReportRequest())
    assert wire.value(Report, response.report) == node.reporter.report


async def test_models_are_sent_once_and_again_when_they_change(node, stub):
    tiny = Model(name="tiny", size_bytes=1, identity="a", problem=Refusal(reason=Reason.MODEL_CORRUPT, message="x"))
    await node.reporter.publish(models=(tiny,))
    call = stub.WatchReport(agent_pb2.WatchReportRequest())
    seen = [await call.read()]
    for changes in ({"cordoned": True}, {"models": ()}):
        await node.reporter.publish(**changes)
        seen.append(await call.read())
    call.cancel()
    assert [(message.models_unchanged, len(message.report.models)) for message in seen] == [
        (False, 1),
        (True, 0),
        (False, 0),
    ]
    assert seen[1].report.cordoned


async def test_a_reservation_is_made_and_reported(node, stub):
    assert not (await reserve(stub)).HasField("refusal")
    assert node.ledger.held == {"p1": {"CPU": 100}}
    assert node.reporter.changes == 1


async def test_the_ledgers_refusal_is_a_value(stub):
    response = await reserve(stub, size=2000)
    assert reason(response.refusal) == "MEMORY_SHORT"
    assert dict(response.refusal.numbers) == {"needed_bytes": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_id": ""},
        {"pool_id": "x" * 129},
        {"pool_id": "a/b"},
        {"pool_id": "a\n"},
        {"ttl_s": 0.5},
        {"ttl_s": 601},
        {"ttl_s": float("nan")},
        {"size": 1 << 51},
        {"device": "../CPU"},
    ],
)
async def test_reservations_out_of_range_are_refused(node, stub, wrong):
    assert reason((await reserve(stub, **wrong)).refusal) == "INVALID_REQUEST"
    assert node.ledger.held == {}


async def test_a_cordoned_node_takes_no_reservation_until_it_is_uncordoned(node, stub):
    for draining in (False, True):
        await stub.SetCordoned(agent_pb2.SetCordonedRequest(cordoned=True, draining=draining))
        assert reason((await reserve(stub)).refusal) == "CORDONED"
        assert node.cordon.draining is draining
    await stub.SetCordoned(agent_pb2.SetCordonedRequest())
    assert not (await reserve(stub)).HasField("refusal")
    assert node.reporter.changes == 4


async def test_what_is_to_stop_when_idle_runs_on_while_it_has_streams(node, stub):
    await reserve(stub)
    await start(stub)
    request = agent_pb2.StopRequest(instance_id="p1", when_idle=True)
    node.active["p1"] = 1
    assert (await stub.Stop(request)).busy
    assert "p1" in node.supervisor.running
    node.active.clear()
    assert not (await stub.Stop(request)).busy
    assert node.supervisor.running == {}


async def test_releasing_twice_is_a_success(node, stub):
    await reserve(stub)
    for _ in range(2):
        await stub.Release(agent_pb2.ReleaseRequest(pool_id="p1"))
    assert node.ledger.held == {}


async def test_a_coordinator_starts_on_its_reservation(node, stub):
    await reserve(stub)
    response = await start(stub)
    assert response.instance.instance_id == "p1"
    assert node.supervisor.starts == [PLAN]
    assert node.ledger.bound == {"p1"}


async def test_starting_again_leaves_the_instance_as_it_is(node, stub):
    await reserve(stub)
    assert (await start(stub)).instance == (await start(stub)).instance
    assert len(node.supervisor.starts) == 1


async def test_nothing_starts_without_a_reservation(node, stub):
    assert reason((await start(stub)).refusal) == "RESERVATION_MISSING"
    assert node.supervisor.starts == []


async def test_a_plan_larger_than_its_reservation_is_refused_and_the_reservation_kept(node, stub):
    await reserve(stub, size=99)
    response = await start(stub)
    assert reason(response.refusal) == "RESERVATION_MISSING"
    assert dict(response.refusal.numbers) == {"needed_bytes": 100, "reserved_bytes": 99}
    assert (node.ledger.held, node.ledger.bound) == ({"p1": {"CPU": 99}}, set())


async def test_a_start_that_fails_gives_its_bytes_back(node, stub):
    node.supervisor.fail_with = refuse(Reason.BACKING_OFF, "died twice", retryable=True)
    await reserve(stub)
    assert reason((await start(stub)).refusal) == "BACKING_OFF"
    assert node.ledger.held == {}


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.LOST])
async def test_a_start_refused_while_the_old_process_is_still_there_keeps_its_bytes(node, stub, state):
    await reserve(stub)
    await start(stub)
    node.supervisor.running["p1"] = msgspec.structs.replace(node.supervisor.running["p1"], state=state)
    node.supervisor.fail_with = refuse(Reason.INSTANCE_NOT_READY, "just stopping", retryable=True)
    assert reason((await start(stub)).refusal) == "INSTANCE_NOT_READY"
    assert "p1" in node.ledger.held


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": 0},
        {"parallel": 1025},
        {"context_per_slot": 0},
        {"batch": 128, "ubatch": 256},
        {"threads": 5000},
        {"pool_number": 1024},
        {"pool_secret": bytes(32)},
        {"backends": (TUNNELLED,)},
        {"backends": (TUNNELLED,), "pool_secret": b"short"},
        {"kv_type": "f16 --rpc evil"},
        {"shares": ()},
        {"shares": PLAN.shares * 2},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], total_bytes=1),)},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], device_id="--rpc"),)},
        {"shares": (msgspec.structs.replace(PLAN.shares[0], device_id="a b"),)},
    ],
)
async def test_plans_out_of_range_are_refused(node, stub, wrong):
    await reserve(stub)
    response = await start(stub, msgspec.structs.replace(PLAN, **wrong))
    assert reason(response.refusal) == "INVALID_REQUEST"
    assert node.supervisor.starts == []


async def test_model_names_that_are_paths_are_refused(node, stub):
    await reserve(stub)
    response = await start(stub, msgspec.structs.replace(PLAN, model="../../etc/passwd"))
    assert reason(response.refusal) == "INVALID_MODEL_NAME"


def lend(stub, **changes):
    fields = {
        "pool_id": "p1",
        "device_ids": ["CPU"],
        "allowed_hosts": ["10.0.0.1"],
        "attach_within_s": 30,
        "threads": 2,
    }
    return stub.StartBackend(agent_pb2.StartBackendRequest(**(fields | changes)))


async def test_a_backend_lends_what_its_pool_reserved(node, stub):
    await reserve(stub)
    response = await lend(stub, coordinator_node="b", pool_secret=bytes(32))
    assert (response.endpoint.host, response.endpoint.port, list(response.endpoint.device_ids)) == (
        "127.0.0.1",
        7500,
        ["CPU"],
    )
    (wish,) = node.supervisor.wishes
    assert (wish.coordinator_node, wish.pool_secret) == ("b", bytes(32))
    assert (wish.pool_id, wish.bytes, wish.threads, wish.allowed_hosts) == ("p1", {"CPU": 100}, 2, ("10.0.0.1",))
    assert node.ledger.bound == {"p1"}


@pytest.mark.parametrize("devices", [["CPU"], ["CPU", "CUDA0"]])
async def test_a_backend_lends_nothing_that_is_not_reserved_and_a_reservation_is_kept(node, stub, devices):
    held = {} if devices == ["CPU"] else {"p1": {"CPU": 100}}
    if held:
        await reserve(stub)
    assert reason((await lend(stub, device_ids=devices)).refusal) == "RESERVATION_MISSING"
    assert (node.supervisor.wishes, node.ledger.held) == ([], held)


async def test_a_backend_that_does_not_come_up_gives_its_bytes_back(node, stub):
    node.supervisor.fail_with = refuse(Reason.PORT_TAKEN, "all taken", retryable=True)
    await reserve(stub)
    assert reason((await lend(stub)).refusal) == "PORT_TAKEN"
    assert node.ledger.held == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_id": "../p"},
        {"pool_id": "p1.backend"},
        {"device_ids": []},
        {"device_ids": ["CPU", "CPU"]},
        {"device_ids": ["-H"]},
        {"device_ids": ["a,b"]},
        {"threads": 5000},
        {"allowed_hosts": []},
        {"allowed_hosts": ["a,b"]},
        {"allowed_hosts": ["--listen"]},
        {"allowed_hosts": ["x"] * 17},
        {"attach_within_s": 0},
        {"attach_within_s": float("nan")},
        {"attach_within_s": 601},
        {"coordinator_node": "x" * 256},
        {"coordinator_node": "b", "pool_secret": b"short"},
        {"pool_secret": bytes(32)},
    ],
)
async def test_backends_out_of_range_are_refused(node, stub, wrong):
    await reserve(stub)
    assert reason((await lend(stub, **wrong)).refusal) == "INVALID_REQUEST"
    assert node.supervisor.wishes == []


async def test_no_pool_may_be_named_like_a_backend(node, stub):
    assert reason((await reserve(stub, pool_id="p.backend")).refusal) == "INVALID_REQUEST"
    assert reason((await start(stub, pool_id="p.backend")).refusal) == "INVALID_REQUEST"


SPLIT = msgspec.structs.replace(
    PLAN,
    shares=(
        DeviceShare(device_id="CPU", layers=0, margin_bytes=40, total_bytes=40),
        DeviceShare(device_id="CPU", layers=3, node_id="n1", margin_bytes=60, total_bytes=60),
        DeviceShare(device_id="CPU", layers=5, node_id="n2", margin_bytes=5000, total_bytes=5000),
    ),
    backends=(
        BackendEndpoint(node_id="n1", host="127.0.0.1", port=7500, device_ids=("CPU",)),
        BackendEndpoint(node_id="n2", host="10.0.0.2", port=7500, device_ids=("CPU",)),
    ),
)


async def test_of_a_plan_over_several_nodes_only_this_nodes_part_must_be_reserved(node, stub):
    await reserve(stub, size=99)
    response = await start(stub, SPLIT)
    assert dict(response.refusal.numbers) == {"needed_bytes": 100, "reserved_bytes": 99}
    await reserve(stub, size=100)
    assert (await start(stub, SPLIT)).instance.instance_id == "p1"
    assert node.supervisor.starts == [SPLIT]


@pytest.mark.parametrize("wrong", [{"host": "a:1,b"}, {"host": ""}, {"port": 0}, {"port": 70_000}, {"device_ids": ()}])
async def test_endpoints_that_cannot_be_are_refused(node, stub, wrong):
    await reserve(stub)
    endpoint = msgspec.structs.replace(SPLIT.backends[0], **wrong)
    response = await start(stub, msgspec.structs.replace(SPLIT, backends=(endpoint,)))
    assert reason(response.refusal) == "INVALID_REQUEST"


async def test_watching_an_instance_ends_when_it_settled(stub):
    await reserve(stub)
    await start(stub)
    call = stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p1"))
    assert [message.instance.percent async for message in call] == [0.0, 50.0, 100.0]


async def test_watching_nothing_is_not_found(stub):
    error = await status_of(stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p1")).read())
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert refusal_of(error).reason is Reason.INSTANCE_NOT_FOUND


async def test_stop_also_gives_back_what_was_only_reserved(node, stub):
    await reserve(stub)
    await stub.Stop(agent_pb2.StopRequest(instance_id="p1"))
    assert node.ledger.held == {}
    await stub.Stop(agent_pb2.StopRequest(instance_id="never-seen"))


async def test_ids_out_of_range_are_refused_where_the_answer_has_no_field_for_it(stub):
    error = await status_of(stub.Stop(agent_pb2.StopRequest(instance_id="../x")))
    assert refusal_of(error).reason is Reason.INVALID_REQUEST


async def lines_of(stub, lines, *, follow=False):
    call = stub.TailLog(agent_pb2.TailLogRequest(instance_id="p1", lines=lines, follow=follow))
    return [line async for message in call for line in message.lines]


async def test_the_last_lines_of_a_log_of_any_bytes(stub, tmp_path):
    (tmp_path / "p1").write_bytes(b"one\ntwo\r\n\xff\xfe three\nunfinished")
    assert await lines_of(stub, 3) == ["two", "\ufffd\ufffd three", "unfinished"]
    assert await lines_of(stub, 0) == []
    assert len(await lines_of(stub, 4_000_000_000)) == 4


async def test_a_huge_log_costs_only_its_end(stub, tmp_path):
    (tmp_path / "p1").write_bytes(b"".join(b"line %d\n" % number for number in range(300_000)))
    found = await lines_of(stub, 10_000)
    assert len(found) == 10_000
    assert found[-1] == "line 299999"


async def test_the_log_of_an_unknown_instance_is_a_refusal(stub):
    call = stub.TailLog(agent_pb2.TailLogRequest(instance_id="p9", lines=1))
    [message] = [message async for message in call]
    assert reason(message.refusal) == "INSTANCE_NOT_FOUND"


async def test_following_a_log_gives_new_lines_and_ends_with_the_instance(node, stub, tmp_path):
    log = tmp_path / "p1"
    log.write_bytes(b"old\nhalf")
    node.supervisor.running["p1"] = Instance(instance_id="p1", model="m", state=InstanceState.READY)
    got = []

    async def read():
        call = stub.TailLog(agent_pb2.TailLogRequest(instance_id="p1", lines=1, follow=True))
        async for message in call:
            got.extend(message.lines)

    reading = asyncio.create_task(read())
    await wait_until(lambda: got == ["old"], what="the last line")
    with log.open("ab") as file:
        file.write(b" and half\nlast words")
    await wait_until(lambda: got == ["old", "half and half"], what="the new line")
    node.supervisor.running.clear()
    await asyncio.wait_for(reading, 5)
    assert got == ["old", "half and half", "last words"]


async def test_a_bug_becomes_internal_and_is_logged(node, stub, capsys):
    node.reporter.current = lambda: 1 / 0
    error = await status_of(stub.GetReport(agent_pb2.GetReportRequest()))
    assert refusal_of(error).reason is Reason.INTERNAL
    assert "ZeroDivisionError" not in error.details()
    assert "rpc_failed" in capsys.readouterr().out


async def test_a_head_s_refusal_is_logged_and_comes_back(node, stub, capsys):
    request = agent_pb2.WatchReportRequest()
    wire.fill(request.refusal, Refusal(reason=Reason.NODE_ID_IN_USE, message="n1 is at big-box already"))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await stub.WatchReport(request).read()
    assert refusal_of(ended.value, "it").reason is Reason.NODE_ID_IN_USE
    assert "n1 is at big-box already" in capsys.readouterr().out


async def test_who_watches_an_agent_that_restarts_is_sent_away_to_wait_for_the_next(node, stub):
    watch = stub.WatchReport(agent_pb2.WatchReportRequest())
    assert (await watch.read()).report.node_id == "n1"

    await node.service.drain(restarting=True)

    for call in (watch, stub.WatchReport(agent_pb2.WatchReportRequest())):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert refusal_of(ended.value, "it").reason is Reason.AGENT_RESTARTING


async def test_a_draining_agent_takes_nothing_new_and_says_so(node, stub, stack, address):
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    check = health_pb2_grpc.HealthStub(channel).Check
    assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    await reserve(stub)
    await node.service.drain()
    assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert reason((await reserve(stub, "p2")).refusal) == "SHUTTING_DOWN"
    assert reason((await start(stub)).refusal) == "SHUTTING_DOWN"
    assert reason((await lend(stub)).refusal) == "SHUTTING_DOWN"
    await stub.GetReport(agent_pb2.GetReportRequest())


@pytest.mark.parametrize("host", ["10.0.0.2", "fd00::2", "big-box.lan"])
async def test_a_link_is_measured_when_a_head_asks_and_reported_soon(node, stub, host):
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id="n2", host=host, port=7462))

    assert wire.value(Link, response.link) == Link(node_id="n2", rtt_s=0.001, bytes_per_s=1e6, boot_id="boot")
    assert node.links.asked == [("n2", host, 7462)]
    assert node.reporter.changes == 1


@pytest.mark.parametrize(
    ("peer", "named"),
    [
        (("", "10.0.0.2", 7462), "node id"),
        (("n" * 256, "10.0.0.2", 7462), "node id"),
        (("n2", "", 7462), "host"),
        (("n2", "-evil", 7462), "host"),
        (("n2", "a b", 7462), "host"),
        (("n2", "10.0.0.2", 0), "port"),
        (("n2", "10.0.0.2", 70000), "port"),
    ],
)
async def test_what_is_no_address_is_not_measured(node, stub, peer, named):
    node_id, host, port = peer
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id=node_id, host=host, port=port))

    assert reason(response.refusal) == "INVALID_REQUEST"
    assert response.refusal.message.startswith(named)
    assert node.links.asked == []


async def test_a_peer_that_refuses_is_a_refusal_and_no_link(node, stub):
    node.links.fail_with = refuse(Reason.STREAM_STALLED, "0 bytes came", retryable=True)
    response = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id="n2", host="10.0.0.2", port=7462))

    assert reason(response.refusal) == "STREAM_STALLED"
    assert not response.HasField("link")


async def test_a_probe_learns_who_answers_and_how_fast_its_bytes_came(stub):
    call = stub.ProbeLink(timeout=10)
    who = await call.read()
    assert (who.node_id, who.bytes_per_s) == ("n1", 0)
    for _ in range(4):
        await call.write(agent_pb2.ProbeLinkRequest(padding=bytes(4096)))
    await call.done_writing()
    assert (await call.read()).bytes_per_s > 0


async def test_a_probe_without_bytes_is_refused(stub):
    call = stub.ProbeLink(timeout=10)
    await call.read()
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()

    assert refusal_of(error.value).reason is Reason.STREAM_STALLED
