"""Daemons that ask each other, and everybody, for certificates: who gets in, who does not and why, and renewal."""

import asyncio
import json
import shutil
from contextlib import asynccontextmanager, contextmanager

import grpc.aio
import psutil
import pytest
from sollol.channels import open_channel, refusal_of
from sollol.client import Client
from sollol.errors import Reason, SollolError
from sollol.inference import Message, Piece, Sampling
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2, agent_pb2_grpc

from sollold.pki.authority import revocations
from tests.certificates import authority, replace_file, revoke, serial_of, write_identity
from tests.daemon import write_engine
from tests.e2e.cluster import text_of
from tests.e2e.daemons import ByHand, short_home
from tests.waiting import wait_until

MODEL = "tiny-reciter"
TOKENS, RATE = 100, 20


@contextmanager
def started(reciting_model, ports):
    """A head and two agents with certificates, on addresses of their own; the engine is slow and plays llama-server."""
    with short_home() as home:
        (home / "models").mkdir()
        shutil.copy(reciting_model, home / "models" / f"{MODEL}.gguf")
        engine = write_engine(home / "engine", f"rate={RATE}", f"tokens={TOKENS}", "computes_s=0.005")
        cluster = ByHand(home, ports, models=home / "models", engine=engine)
        cluster.pki, cluster.ours = home / "pki", authority()
        cluster.tls_dir = write_identity(cluster.pki / "admin", cluster.ours, "admin", "operator")
        try:
            cluster.start_redis()
            for node, address in (("n3", "127.0.0.3"), ("n4", "127.0.0.4")):
                tls_dir = write_identity(cluster.pki / node, cluster.ours, "agent", node)
                cluster.start_agent(node, "--listen", address, "--host", address, "--tls-dir", str(tls_dir))
            head = write_identity(cluster.pki / "head", cluster.ours, "head", "h")
            cluster.start_head("--tls-dir", str(head), "--host", "127.0.0.3")
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
async def secured(reciting_model, ports):
    """For a test that revokes or replaces what the daemons have."""
    with started(reciting_model, ports) as cluster:
        await cluster.nodes_seen(2)
        yield cluster


@pytest.fixture(scope="module")
def unchanged(reciting_model, ports):
    """For those that only ask."""
    with started(reciting_model, ports) as cluster:
        asyncio.run(cluster.nodes_seen(2))
        yield cluster


def logged(cluster, name, event):
    lines = (json.loads(line) for line in cluster.log(name).splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == event]


def connections(cluster):
    """Those of the head to agents: ports of both ends."""
    agents = {cluster.port_of(node) for node in ("n3", "n4")}
    found = psutil.Process(cluster.processes["head"].pid).net_connections("tcp")
    return {(each.laddr.port, each.raddr.port) for each in found if each.raddr and each.raddr.port in agents}


def followed(cluster, name):
    """Whether a daemon uses the certificate that is now in its directory."""
    serials = [line["serial"] for line in logged(cluster, name, "certificate_followed")]
    return serials[-1:] == [serial_of(cluster.pki / name)]


async def refused(cluster, tls_dir, ask):
    """The reason that the user sees."""
    with pytest.raises(SollolError) as raised:
        async with Client(cluster.head, tls_dir=tls_dir) as client:
            await ask(client)
    return raised.value.refusal


async def test_each_role_gets_what_is_its_own_and_everybody_else_hears_why_not(unchanged):
    client = write_identity(unchanged.pki / "client", unchanged.ours, "client", "someone")
    async with Client(unchanged.head, tls_dir=client) as user:
        assert [model.name for model in await user.list_models()] == [MODEL]

    assert (await refused(unchanged, client, lambda user: user.nodes())).reason is Reason.WRONG_ROLE
    agent = await refused(unchanged, unchanged.pki / "n3", lambda user: user.list_models())
    assert agent.reason is Reason.WRONG_ROLE
    told = logged(unchanged, "head", "peer_refused")
    assert [(line["reason"], line["method"]) for line in told] == [
        ("WRONG_ROLE", "/sollol.v1.ClusterService/ListNodes"),
        ("WRONG_ROLE", "/sollol.v1.InferenceService/ListModels"),
    ]
    assert "client someone of test" in told[0]["message"]

    assert (await refused(unchanged, None, lambda user: user.nodes())).reason is Reason.NO_CERTIFICATE
    expired = write_identity(unchanged.pki / "expired", unchanged.ours, "admin", "o", expired=True)
    foreign = write_identity(unchanged.pki / "foreign", authority(), "admin", "o", trusts=unchanged.ours.certificate)
    for stranger in (expired, foreign):
        refusal = await refused(unchanged, stranger, lambda user: user.nodes())
        assert refusal.reason is Reason.FOREIGN_CERTIFICATE
        assert "refuses our certificate" in refusal.message
    elsewhere = write_identity(unchanged.pki / "elsewhere", authority(), "admin", "o")
    assert (await refused(unchanged, elsewhere, lambda user: user.nodes())).reason is Reason.FOREIGN_CERTIFICATE
    # gRPC's core tells standard error of handshakes that failed.
    assert "certificate has expired" in unchanged.log("head")
    assert "unable to get local issuer certificate" in unchanged.log("head")


async def test_nodes_say_how_long_their_certificates_last(unchanged):
    status, out, _ = await unchanged.cli("nodes")
    assert status == 0
    assert out.count("90.0 days") == 2
    status, out, _ = await unchanged.cli("nodes", "--json")
    ends = [node["report"]["certificate_expires_in_s"] for node in json.loads(out)["nodes"]]
    assert all(89 * 86_400 < end < 90 * 86_400 for end in ends)


async def test_whoever_is_revoked_is_refused_at_the_next_call(secured):
    async with secured.client() as operator:
        await operator.nodes()
        revoke(secured.pki / "head", secured.ours, secured.pki / "admin")
        with pytest.raises(SollolError, match="CERTIFICATE_REVOKED"):
            await operator.nodes()
    assert logged(secured, "head", "peer_refused")[0]["reason"] == "CERTIFICATE_REVOKED"


async def test_the_running_stream_of_a_user_who_is_revoked_ends_at_once_with_the_reason(secured):
    client = write_identity(secured.pki / "client", secured.ours, "client", "someone")
    pieces = []

    async def ask():
        async with Client(secured.head, tls_dir=client) as user:
            request = user.chat(MODEL, [Message(role="user", content="go on")], Sampling(max_tokens=TOKENS))
            async for event in request:
                if isinstance(event, Piece):
                    pieces.append(event)
                    if len(pieces) == 1:
                        revoke(secured.pki / "head", secured.ours, client)

    with pytest.raises(SollolError, match="has been revoked") as raised:
        await asyncio.wait_for(ask(), 30)
    assert raised.value.refusal.reason is Reason.CERTIFICATE_REVOKED
    assert 1 <= len(pieces) < TOKENS
    await wait_until(lambda: logged(secured, "head", "peer_cut"), what="it is logged")
    assert logged(secured, "head", "peer_cut")[0]["peer"] == "client someone of test"
    assert await secured.say(MODEL, max_tokens=1)


async def test_a_head_that_is_revoked_loses_its_streams_and_its_view_of_every_node(secured):
    async with answering(secured) as stream:
        for node in ("n3", "n4"):
            revoke(secured.pki / node, secured.ours, secured.pki / "head")
        text, last = await asyncio.wait_for(stream, 15)
    assert len(text.split()) < TOKENS
    assert last["error"]["code"] == "CERTIFICATE_REVOKED"
    for node in ("n3", "n4"):
        await wait_until(lambda node=node: logged(secured, node, "peer_cut"), what=f"{node} has cut it off")
        assert {line["reason"] for line in logged(secured, node, "peer_cut")} == {"CERTIFICATE_REVOKED"}
    await wait_until(
        lambda: (
            sum(line["reason"] == "CERTIFICATE_REVOKED" for line in logged(secured, "head", "agent_not_watched")) == 2
        ),
        within_s=10,
        what="the head is told why it sees nobody",
    )


async def test_an_agent_that_is_revoked_is_let_go_of_with_the_streams_on_it(secured):
    async with answering(secured) as stream:
        revoke(secured.pki / "head", secured.ours, secured.pki / "n3", secured.pki / "n4")
        text, last = await asyncio.wait_for(stream, 15)
    assert len(text.split()) < TOKENS
    assert last["error"]["code"] == "AGENT_UNREACHABLE"
    await wait_until(
        lambda: (
            {line["peer"] for line in logged(secured, "head", "peer_cut")} == {"agent n3 of test", "agent n4 of test"}
        ),
        what="both are cut off",
    )


@asynccontextmanager
async def answering(cluster):
    """A stream in its middle; the value is a task that returns its whole text and its last event."""
    begun = asyncio.Event()

    async def read_all():
        text, last = "", {}
        async with cluster.stream(MODEL, max_tokens=TOKENS) as events:
            async for event in events:
                text, last = text + text_of(event), event
                begun.set()
        return text, last

    task = asyncio.create_task(read_all())
    try:
        await asyncio.wait_for(begun.wait(), 20)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_certificates_and_authority_change_in_the_middle_of_a_stream_that_loses_nothing(secured):
    old, new = secured.ours, authority()
    both = old.certificate + new.certificate
    names = {"head": ("head", "h"), "n3": ("agent", "n3"), "n4": ("agent", "n4")}
    async with answering(secured) as stream:
        former, made = {name: serial_of(secured.pki / name) for name in names}, connections(secured)
        assert len({port for _, port in made}) == 2, "the head is connected to both agents"
        for name in (*names, "admin"):
            replace_file(secured.pki / name / "ca.pem", both)
        for name, (role, node_id) in names.items():
            write_identity(secured.pki / name, new, role, node_id, trusts=both)
        for name in names:
            await wait_until(lambda name=name: followed(secured, name), what=f"{name} uses its new certificate")
        assert not stream.done()
        text, last = await asyncio.wait_for(stream, 30)
    assert text.split() == [f"t{number}" for number in range(TOKENS)]
    assert last == {"done": True}
    await wait_until(
        lambda: len({port for _, port in connections(secured) - made}) == 2,
        within_s=20,
        what="the head has another connection to each agent",
    )
    # From here on nobody admits a certificate from before: whatever still works has been made anew.
    for name in names:
        replace_file(secured.pki / name / "revoked", revocations(new, former.values(), 1))
    text = await secured.say(MODEL, max_tokens=5)
    assert text.split() == ["t0", "t1", "t2", "t3", "t4"]
    assert logged(secured, "head", "node_disconnected") == []


async def test_an_agent_with_the_certificate_of_another_node_does_not_start(unchanged):
    process = unchanged.start_agent("n5", "--listen", "127.0.0.5", "--tls-dir", str(unchanged.pki / "n4"))
    assert await asyncio.to_thread(process.wait, 40) == 5
    (ended,) = logged(unchanged, "n5", "ended_by_refusal")
    assert ended["reason"] == "WRONG_NODE"
    assert "set node_id to n4" in ended["message"]


async def reported(cluster, node_id):
    """The number of the report that the head has of a node."""
    async with cluster.client() as operator:
        return next(node.report.sequence for node in await operator.nodes() if node.report.node_id == node_id)


async def test_a_node_that_is_revoked_is_not_watched_and_the_log_says_why(secured):
    secured.processes["n4"].terminate()
    secured.processes["n4"].wait(40)
    await secured.nodes_seen(1)
    revoke(secured.pki / "head", secured.ours, secured.pki / "n4")
    secured.start_agent("n4", "--listen", "127.0.0.4", "--host", "127.0.0.4", "--tls-dir", str(secured.pki / "n4"))
    await wait_until(
        lambda: any(line["reason"] == "CERTIFICATE_REVOKED" for line in logged(secured, "head", "agent_not_watched")),
        within_s=10,
        what="the head says that n4 is revoked",
    )
    told = await reported(secured, "n3")

    async def goes_on():
        return await reported(secured, "n3") >= told + 2  # a heartbeat lies between; n4 is dialled more often

    await wait_until(goes_on, within_s=20, what="the head hears of the other node")
    assert [line["node"] for line in logged(secured, "head", "node_connected")].count("n4") == 1


async def test_the_list_of_the_revoked_reaches_every_daemon_by_itself(secured, ports):
    client = write_identity(secured.pki / "client", secured.ours, "client", "someone")
    other = write_identity(secured.pki / "other", secured.ours, "head", "other")
    port = ports()
    secured.start_another_head("other", "--tls-dir", str(other), "--grpc-port", str(port))
    async with Client(f"127.0.0.1:{port}", tls_dir=client) as user:
        await wait_until(lambda: len(logged(secured, "other", "node_connected")) == 2, within_s=20, what="it sees both")
        assert [model.name for model in await user.list_models()] == [MODEL]
        revoke(secured.pki / "head", secured.ours, client, number=2)
        for name in ("n3", "n4", "other"):
            kept = secured.pki / name / "revoked"
            await wait_until(kept.exists, within_s=10, what=f"{name} has the list")
            assert kept.read_bytes() == (secured.pki / "head" / "revoked").read_bytes()
        with pytest.raises(SollolError, match="CERTIFICATE_REVOKED"):
            await user.list_models()
    await wait_until(lambda: logged(secured, "other", "revoked_list_taken"), what="it is told")
    (taken,) = logged(secured, "other", "revoked_list_taken")
    assert (taken["number"], taken["revoked"]) == (2, 1)
    assert taken["peer"].startswith("agent ")


async def test_an_agent_may_measure_the_link_to_another_agent_and_nothing_else(unchanged):
    address = f"127.0.0.3:{unchanged.port_of('n3')}"
    async with open_channel(address, TlsFiles(unchanged.pki / "n4").current()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await agent_pb2_grpc.AgentServiceStub(channel).GetReport(agent_pb2.GetReportRequest())
    assert refusal_of(raised.value).reason is Reason.WRONG_ROLE
    async with open_channel(address, TlsFiles(unchanged.pki / "head").current(), name="n3.agent.sollol") as channel:
        request = agent_pb2.MeasureLinkRequest(node_id="n4", host="127.0.0.4", port=unchanged.port_of("n4"))
        measured = await agent_pb2_grpc.AgentServiceStub(channel).MeasureLink(request, timeout=20)
    assert measured.link.node_id == "n4"
    assert measured.link.bytes_per_s > 1e6
    assert 0 < measured.link.rtt_s < 0.1
