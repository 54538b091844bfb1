"""One model over three nodes with tunnels between them: three agents' supervisors, real engines, real certificates."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from sollol.errors import Reason, Refusal, SollolError
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare, Instance, InstanceState, RpcTransport

from agent.forwarder.status import read_status
from agent.supervisor.files import files_of
from agent.supervisor.lending import backend_id, forwarder_id
from agent.supervisor.owner import Limits
from agent.supervisor.records import FORWARDER, TUNNEL
from agent.supervisor.restarts import RestartPolicy
from agent.supervisor.supervisor import Supervisor
from agent.supervisor.tunnelling import TunnelLaunch, TunnelWatch, tunnel_id
from agent.tunnel.status import TunnelStatus, read_tunnel_status
from tests.certificates import authority, write_identity
from tests.supervised import changes_of, directories, plan_of, record_of, runs, settled, site_of, supervising, wish_of
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
REAL = Limits(start_timeout_s=30, stop_grace_s=5, gone_after_s=0.5, freeze_poll_s=0.2, connect_timeout_s=5)
COORDINATOR, LENDERS = "n1", ("n2", "n3")
SECRET = bytes(range(32))
RECITED = 100


class Nodes:
    """The supervisors by node id, each with its own directories under `directory`."""

    def __init__(self, directory: Path, start_agent: Callable[[str], Awaitable[Supervisor]]) -> None:
        self.directory, self._start_agent = directory, start_agent
        self.supervisors: dict[str, Supervisor] = {}

    @property
    def coordinator(self) -> Supervisor:
        return self.supervisors[COORDINATOR]

    async def lend(self, node_id: str, **wish: object) -> BackendEndpoint:
        fields = {"coordinator_node": COORDINATOR, "pool_secret": b"" if node_id == COORDINATOR else SECRET} | wish
        return await self.supervisors[node_id].start_backend(wish_of("p", **fields))

    async def start(self, *lenders: str) -> Instance:
        """The pool p, its nine layers dealt to the lenders in their order."""
        backends = tuple([await self.lend(node_id) for node_id in lenders])
        await self.coordinator.start("p", split(*backends))
        instance = await settled(self.coordinator, "p")
        assert instance.state is InstanceState.READY, instance
        return instance

    async def restart(self, node_id: str) -> int:
        """Its agent leaves everything to the next one; returns how many instances that takes up."""
        await self.supervisors[node_id].close(leave=True)
        self.supervisors[node_id] = await self._start_agent(node_id)
        return self.supervisors[node_id].adopt()

    def tunnel_pid(self) -> int:
        return record_of(self.directory / COORDINATOR, "p").processes[TUNNEL].pid

    def forwarder_pid(self, node_id: str) -> int:
        return record_of(self.directory / node_id, backend_id("p")).processes[FORWARDER].pid

    def tunnel(self) -> TunnelStatus:
        status = read_tunnel_status(files_of(tunnel_id("p"), directories(self.directory / COORDINATOR)).status)
        assert status is not None
        return status

    def engine_pids(self) -> list[int]:
        found = [each.pid for supervisor in self.supervisors.values() for each in supervisor.instances()]
        return [*found, self.tunnel_pid(), *(self.forwarder_pid(node_id) for node_id in LENDERS)]


@pytest.fixture
async def nodes(
    tmp_path: Path, engine_binary: Path, reciting_model: Path, ports: Callable[[], int]
) -> AsyncIterator[Nodes]:
    ca, sites = authority(), {}
    for node_id in (COORDINATOR, *LENDERS):
        first = ports()
        tls_dir = write_identity(tmp_path / node_id / "pki", ca, "agent", node_id)
        site = site_of(engine_binary.parent / "ggml-rpc-server", node_id, range(first, first + 20))
        sites[node_id] = msgspec.structs.replace(site, tls_dir=tls_dir)
    async with contextlib.AsyncExitStack() as stack:

        async def start_agent(node_id: str) -> Supervisor:
            engine, where = (str(engine_binary),), tmp_path / node_id
            agent = supervising(where, engine, resolve=lambda _: reciting_model, limits=REAL, site=sites[node_id])
            return await stack.enter_async_context(agent)

        nodes = Nodes(tmp_path, start_agent)
        for node_id in sites:
            nodes.supervisors[node_id] = await start_agent(node_id)
        yield nodes


def split(*backends: BackendEndpoint) -> CoordinatorPlan:
    layers = [9 // len(backends)] * len(backends)
    layers[0] += 9 - sum(layers)
    shares = [DeviceShare(device_id="CPU", layers=0)]
    for backend, count in zip(backends, layers, strict=True):
        shares.append(DeviceShare(device_id="CPU", layers=count, node_id=backend.node_id))
    secret = SECRET if any(backend.tunnelled for backend in backends) else b""
    return msgspec.structs.replace(plan_of("tiny"), shares=tuple(shares), backends=backends, pool_secret=secret)


async def complete(supervisor: Supervisor, seen: asyncio.Event, **body: object) -> bytes:
    """All that comes of one answer, to its end or to where it breaks."""
    reader, writer = await asyncio.open_unix_connection(str(supervisor.socket_of("p")))
    content = json.dumps({"prompt": "hello", "temperature": 0, "stream": True} | body)
    writer.write(f"POST /completion HTTP/1.0\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode())
    said = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(1 << 16):
            said += more
            seen.set()
    writer.close()
    return said


async def recite(supervisor: Supervisor) -> str:
    said = await complete(supervisor, asyncio.Event(), n_predict=RECITED)
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith(b"data: {")]
    assert events[-1]["stop"], events
    return "".join(event["content"] for event in events)


async def failed(nodes: Nodes, within_s: float) -> Refusal:
    return await wait_until(lambda: nodes.coordinator.failure_of("p"), within_s=within_s, what="the pool has failed")


async def nothing_left(nodes: Nodes, pids: list[int]) -> None:
    await wait_until(lambda: not [pid for pid in pids if runs(pid)], within_s=8, what="no process is left")
    files = [nodes.directory / node_id / "run" for node_id in nodes.supervisors]
    await wait_until(lambda: not [path for run in files for path in run.iterdir()], what="no file is left")


async def test_a_pool_through_tunnels_recites_what_it_should_and_every_byte_is_counted(nodes: Nodes) -> None:
    ready = await nodes.start(*LENDERS)
    text = await recite(nodes.coordinator)
    pids = nodes.engine_pids()
    await nodes.coordinator.stop("p")
    await nothing_left(nodes, pids)
    direct = await nodes.start(COORDINATOR)
    assert direct.started_unix_s > ready.started_unix_s
    assert await recite(nodes.coordinator) == text


async def test_each_end_counts_the_same_bytes(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    await recite(nodes.coordinator)

    def counts() -> bool:
        routes = {route.node_id: (route.up_bytes, route.down_bytes) for route in nodes.tunnel().routes}
        forwarders = {}
        for node_id in LENDERS:
            status = read_status(files_of(forwarder_id("p"), directories(nodes.directory / node_id)).status)
            assert status is not None
            forwarders[node_id] = (status.up_bytes, status.down_bytes)
        return routes == forwarders and min(up for up, _ in routes.values()) > 100_000

    await wait_until(counts, within_s=3, what="tunnel and forwarders have counted the same")


async def test_backends_and_tunnels_are_reached_over_loopback_only_and_nothing_shows_the_secret(nodes: Nodes) -> None:
    instance = await nodes.start(*LENDERS)
    tunnel = nodes.tunnel_pid()
    backends = [next(each.pid for each in nodes.supervisors[name].instances()) for name in LENDERS]
    for pid in (tunnel, *backends):
        listening = [each for each in psutil.Process(pid).net_connections("inet") if each.status == psutil.CONN_LISTEN]
        assert {each.laddr.ip for each in listening} == {"127.0.0.1"}, listening
    engine = {each.raddr for each in psutil.Process(instance.pid).net_connections("inet") if each.raddr}
    assert {address.port for address in engine} == {route.port for route in nodes.tunnel().routes}
    shown = b"".join(path.read_bytes() for path in nodes.directory.rglob("*") if path.is_file())
    shown += b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in nodes.engine_pids())
    assert SECRET not in shown
    assert SECRET.hex().encode() not in shown


@pytest.mark.parametrize(
    ("number", "within_s", "words"),
    [
        (signal.SIGKILL, 1.5, "lost the tunnel to its backends"),
        (signal.SIGSTOP, 4, "has a tunnel that was stopped by a signal"),
    ],
)
async def test_a_lost_tunnel_ends_the_pool_in_time_and_leaves_nothing(
    nodes: Nodes, number: signal.Signals, within_s: float, words: str
) -> None:
    await nodes.start(*LENDERS)
    pids, seen = nodes.engine_pids(), asyncio.Event()
    answer = asyncio.create_task(complete(nodes.coordinator, seen, n_predict=4000, ignore_eos=True))
    await asyncio.wait_for(seen.wait(), 5)
    began_s = time.monotonic()
    os.kill(nodes.tunnel_pid(), number)
    refusal = await failed(nodes, within_s)
    print(f"{number.name}: told after {time.monotonic() - began_s:.2f} s: {refusal.message}")
    assert (refusal.reason, words in refusal.message) == (Reason.ENGINE_DIED, True), refusal
    await answer
    await nothing_left(nodes, pids)
    await nodes.start(*LENDERS)
    assert await recite(nodes.coordinator)


async def test_an_idle_pool_whose_tunnel_dies_is_ended_too(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    os.kill(nodes.tunnel_pid(), signal.SIGKILL)
    assert "lost the tunnel" in (await failed(nodes, 1.5)).message


async def test_a_dead_backend_is_named_though_all_look_alike_from_the_engine(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    pids, seen = nodes.engine_pids(), asyncio.Event()
    answer = asyncio.create_task(complete(nodes.coordinator, seen, n_predict=4000, ignore_eos=True))
    await asyncio.wait_for(seen.wait(), 5)
    (lending,) = nodes.supervisors["n3"].instances()
    os.kill(lending.pid, signal.SIGKILL)
    refusal = await failed(nodes, 2)
    assert refusal.reason is Reason.ENGINE_DIED
    assert "backend on n3" in refusal.message
    assert "n2" not in refusal.message
    await answer
    await nothing_left(nodes, pids)


async def test_a_frozen_forwarder_is_given_up_and_its_pool_with_it(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    pids = nodes.engine_pids()
    os.kill(nodes.forwarder_pid("n2"), signal.SIGSTOP)
    assert "backend on n2" in (await failed(nodes, 4)).message
    frozen = await wait_until(lambda: nodes.supervisors["n2"].failure_of(backend_id("p")), what="its agent says so too")
    assert frozen.reason is Reason.ENGINE_STALLED
    await nothing_left(nodes, pids)


async def test_a_backend_for_this_very_node_stays_on_loopback_without_tls(nodes: Nodes) -> None:
    own = await nodes.lend(COORDINATOR)
    other = await nodes.lend("n2")
    assert (own.host, own.tunnelled, other.tunnelled) == ("127.0.0.1", False, True)
    command = Path(f"/proc/{nodes.forwarder_pid(COORDINATOR)}/cmdline").read_text().split("\0")
    assert "--own-user" in command
    await nodes.coordinator.start("p", split(own, other))
    assert (await settled(nodes.coordinator, "p")).state is InstanceState.READY
    assert [route.node_id for route in nodes.tunnel().routes] == ["n2"]
    assert await recite(nodes.coordinator)


async def test_a_wrong_secret_starts_no_pool_and_the_backends_end_by_themselves(nodes: Nodes) -> None:
    backends = tuple([await nodes.lend(node_id, attach_within_s=3.0) for node_id in LENDERS])
    await nodes.coordinator.start("p", msgspec.structs.replace(split(*backends), pool_secret=bytes(32)))
    instance = await settled(nodes.coordinator, "p")
    assert instance.refusal is not None
    assert instance.refusal.reason in (Reason.ENGINE_DIED, Reason.ENGINE_START_FAILED)
    log = files_of(forwarder_id("p"), directories(nodes.directory / "n2")).log.read_text()
    refused = [json.loads(line) for line in log.splitlines()]
    assert {(line["why"], line["who"]) for line in refused} == {("wrong_secret", "agent n1 of test")}
    await wait_until(lambda: not nodes.supervisors["n2"].instances(), within_s=6, what="the backend has ended")


async def test_nodes_that_differ_in_their_transport_refuse_before_anything_starts(
    nodes: Nodes, tmp_path: Path, engine_binary: Path, reciting_model: Path
) -> None:
    plain = site_of(engine_binary.parent / "ggml-rpc-server", "n4", range(1, 2))
    assert plain.transport is RpcTransport.DIRECT
    direct = BackendEndpoint(node_id="n4", host="127.0.0.1", port=1, device_ids=("CPU",))
    refusals = []
    async with supervising(
        tmp_path / "n4", (str(engine_binary),), resolve=lambda _: reciting_model, site=plain
    ) as supervisor:
        tunnelled = msgspec.structs.replace(direct, node_id="n2", tunnelled=True)
        for attempt in (
            lambda: supervisor.start_backend(wish_of("q", coordinator_node="n1", pool_secret=SECRET)),
            lambda: supervisor.start("q", split(tunnelled)),
            lambda: nodes.coordinator.start("q", split(direct)),
            lambda: nodes.lend("n2", pool_secret=b""),
        ):
            with pytest.raises(SollolError) as refused:
                await attempt()
            refusals.append(refused.value.refusal)
        assert not supervisor.instances()
    assert {refusal.reason for refusal in refusals} == {Reason.TRANSPORT_MISMATCH}
    assert all("set rpc_transport alike" in refusal.message for refusal in refusals)
    assert not nodes.coordinator.instances()


async def test_the_ports_of_tunnels_come_back(nodes: Nodes) -> None:
    for _ in range(3):
        await nodes.start("n2")
        used = [route.port for route in nodes.tunnel().routes]
        await nodes.coordinator.stop("p")
        await nodes.supervisors["n2"].stop("p")
        for port in used:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
    assert nodes.coordinator._ports._claimed == set()


async def test_agents_that_restart_leave_both_ends_as_they_are_and_the_next_ones_take_them_up(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    pids, seen = nodes.engine_pids(), asyncio.Event()
    answer = asyncio.create_task(complete(nodes.coordinator, seen, n_predict=1500, ignore_eos=True))
    await asyncio.wait_for(seen.wait(), 5)
    assert [await nodes.restart(node_id) for node_id in (COORDINATOR, *LENDERS)] == [1, 1, 1]
    await wait_until(lambda: nodes.engine_pids() == pids, what="the same processes are there")
    assert b'"stop":true' in await answer
    assert await recite(nodes.coordinator)
    assert nodes.coordinator._ports._claimed == {route.port for route in nodes.tunnel().routes}
    os.kill(nodes.tunnel_pid(), signal.SIGKILL)
    assert "lost the tunnel" in (await failed(nodes, 2)).message
    await nothing_left(nodes, pids)


async def test_a_stop_that_comes_before_anything_else_ends_all_that_was_taken_up(nodes: Nodes) -> None:
    await nodes.start(*LENDERS)
    pids = nodes.engine_pids()
    for node_id in (COORDINATOR, *LENDERS):
        assert await nodes.restart(node_id) == 1
        await nodes.supervisors[node_id].stop("p")
        assert not nodes.supervisors[node_id].instances()
    assert not [pid for pid in pids if runs(pid)]
    await nothing_left(nodes, pids)


async def test_a_tunnel_outlives_its_agent_and_ends_by_itself_when_its_coordinator_is_gone(nodes: Nodes) -> None:
    ready = await nodes.start(*LENDERS)
    pids = nodes.engine_pids()
    await nodes.coordinator.close(leave=True)
    assert all(runs(pid) for pid in pids)
    os.kill(ready.pid, signal.SIGKILL)
    await wait_until(lambda: not [pid for pid in pids if runs(pid)], within_s=4, what="all have ended by themselves")
    assert nodes.tunnel().ended == "coordinator_gone"
    assert await nodes.restart(COORDINATOR) == 0
    await nothing_left(nodes, pids)


def to_nobody(port: int = 1) -> CoordinatorPlan:
    return split(BackendEndpoint(node_id="n2", host="127.0.0.1", port=port, device_ids=("CPU",), tunnelled=True))


async def test_a_stop_while_the_tunnel_starts_is_no_death_of_the_model(nodes: Nodes) -> None:
    for number in range(RestartPolicy().deaths):
        await nodes.coordinator.start(f"p{number}", to_nobody())
        changes = asyncio.create_task(changes_of(nodes.coordinator, f"p{number}"))
        await nodes.coordinator.stop(f"p{number}")
        states = [change.state for change in await changes]
        assert states[-2:] == [InstanceState.STOPPING, InstanceState.STOPPED], states
        assert not files_of(f"p{number}", directories(nodes.directory / COORDINATOR)).state.exists()
    assert (await nodes.coordinator.start("p", to_nobody())).state is InstanceState.STARTING


async def test_a_tunnel_that_cannot_start_says_why_and_is_no_death_of_the_model(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, ports: Callable[[], int]
) -> None:
    refusals = []
    with socket.create_server(("127.0.0.1", ports())) as stranger:
        taken = stranger.getsockname()[1]
        with monkeypatch.context() as between:  # he came between the look at the port and the tunnel's start
            between.setattr(nodes.coordinator._ports, "claim", lambda: taken)
            for number in range(RestartPolicy().deaths):
                await nodes.coordinator.start(f"p{number}", to_nobody())
                refusals.append((await settled(nodes.coordinator, f"p{number}")).refusal)
    for path in (nodes.directory / COORDINATOR / "pki").iterdir():
        path.unlink()
    await nodes.coordinator.start("q", to_nobody())
    refusals.append((await settled(nodes.coordinator, "q")).refusal)
    assert not list(directories(nodes.directory / COORDINATOR).instances.iterdir()), "a record of none that runs"
    reasons = [refusal.reason for refusal in refusals if refusal is not None]
    assert reasons == [*[Reason.PORT_TAKEN] * RestartPolicy().deaths, Reason.CERTIFICATE_UNREADABLE]
    assert str(taken) in refusals[0].message
    assert str(nodes.directory / COORDINATOR / "pki") in refusals[-1].message
    assert (await nodes.coordinator.start("p", to_nobody())).state is InstanceState.STARTING


@pytest.mark.parametrize(("every_s", "frozen"), [(0.0, True), (600.0, False)])
async def test_a_tunnel_is_frozen_when_it_was_stopped_at_two_looks_however_often_one_asks(
    tmp_path: Path, every_s: float, *, frozen: bool
) -> None:
    files = files_of(tunnel_id("p"), directories(tmp_path))
    launch = TunnelLaunch(pool_id="p", routes=(), tls_dir=None, environment={}, files=files, secret=b"")
    with subprocess.Popen(["sleep", "60"]) as child:
        exited = asyncio.create_task(asyncio.to_thread(child.wait))
        watch = TunnelWatch(child.pid, exited, launch, every_s=every_s)
        os.kill(child.pid, signal.SIGSTOP)
        await wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, what="it is stopped")
        assert any(watch.frozen() for _ in range(20)) is frozen
        child.kill()
        await exited
