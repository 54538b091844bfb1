"""Links to a real agent, a process of its own, through a proxy that makes them bad: what is measured is what is there."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
from sollol.channels import new_server, open_channel
from sollol.errors import Reason, SollolError
from sollol.v1 import agent_pb2, agent_pb2_grpc

from agent import link_probe, links, ping
from agent.link_probe import PROBE_WITHIN_S, count, probe, who_answers
from agent.links import Links
from agent.ping import round_trip_s
from agent.rate import MOST_BYTES
from tests.daemon import ENDS_WITHIN_S, agent_flags, write_engine
from tests.toxic_proxy import ToxicProxy
from tests.waiting import wait_until

UP_WITHIN_S = 20


@pytest.fixture(scope="module")
def peer(ports, tmp_path_factory, reciting_model):
    """(host, port) of an agent called `b`."""
    home, port = tmp_path_factory.mktemp("peer"), ports()
    flags = agent_flags(home, node="b", port=port, engine=write_engine(home / "engine"), model=reciting_model)
    environ = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            (sys.executable, "-m", "agent", "--log-format", "json", *flags), stdout=log, stderr=log, env=environ
        )
    try:
        deadline_s = time.monotonic() + UP_WITHIN_S
        while b"agent_ready" not in (home / "log").read_bytes():
            assert time.monotonic() < deadline_s, (home / "log").read_text()
            time.sleep(0.02)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(ENDS_WITHIN_S)
    assert b"Traceback" not in (home / "log").read_bytes(), (home / "log").read_text()


@pytest.fixture
async def proxy(peer):
    async with ToxicProxy(peer).running() as proxy:
        yield proxy


async def within(low, high, measure):
    """Measure until it is right: a busy machine spoils one or another, and makes none right that is wrong."""
    found = []
    while not found or not low <= found[-1] <= high:
        assert len(found) < 5, f"none from {low} to {high}: {found}"
        found.append(await measure())


async def rate_of(address):
    return (await probe(*address)).bytes_per_s


async def test_over_loopback_it_is_fast_and_says_who_answered(peer):
    begun_s = time.perf_counter()
    found = await probe(*peer)

    assert time.perf_counter() - begun_s < PROBE_WITHIN_S
    assert found.node_id == "b"
    assert 0 < found.rtt_s < 0.1
    await within(117e6, float("inf"), lambda: rate_of(peer))  # gigabit Ethernet is not what limits it


@pytest.mark.parametrize("one_way_s", [0.002, 0.01])
async def test_the_round_trip_is_that_of_the_link_within_20_percent(peer, proxy, one_way_s):
    direct_s = min([await round_trip_s(*proxy.address) for _ in range(3)])
    proxy.latency_s = one_way_s

    await within(2 * one_way_s, 2 * one_way_s * 1.2 + direct_s, lambda: round_trip_s(*proxy.address))


@pytest.mark.parametrize("rate", [0.25e6, 1e6, 5e6, 12.5e6])
async def test_the_rate_is_that_of_the_link_within_25_percent(proxy, rate):
    proxy.bytes_per_s = rate
    proxy.latency_s = 0.001

    await within(rate * 0.75, rate * 1.25, lambda: rate_of(proxy.address))


async def test_a_far_link_has_its_rate_all_the_same(proxy):
    proxy.bytes_per_s, proxy.latency_s, proxy.jitter_s = 1e6, 0.01, 0.002

    await within(0.02, 0.03, lambda: round_trip_s(*proxy.address))
    await within(0.75e6, 1.25e6, lambda: rate_of(proxy.address))


async def test_a_peer_that_accepts_and_never_answers_costs_two_seconds(proxy):
    proxy.freeze()
    begun_s = time.perf_counter()
    with pytest.raises(SollolError, match="no answer in time") as refused:
        await probe(*proxy.address)

    assert refused.value.refusal.reason is Reason.AGENT_UNREACHABLE
    assert time.perf_counter() - begun_s < ping.WITHIN_S + 5


async def test_a_link_that_falls_silent_in_the_middle_ends_in_bounded_time(proxy, monkeypatch):
    async def then_freeze(host, port, tls):
        found = await round_trip_s(host, port, tls)
        proxy.bytes_per_s = 1e6
        asyncio.get_running_loop().call_later(0.2, proxy.freeze)
        return found

    monkeypatch.setattr(link_probe, "round_trip_s", then_freeze)
    begun_s = time.perf_counter()
    with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
        await probe(*proxy.address)

    assert time.perf_counter() - begun_s < PROBE_WITHIN_S + 5


async def test_a_link_that_is_reset_in_the_middle_is_out_of_reach(proxy, monkeypatch):
    async def then_reset(host, port, tls):
        found = await round_trip_s(host, port, tls)
        proxy.bytes_per_s = 1e6
        asyncio.get_running_loop().call_later(0.2, proxy.reset)
        return found

    monkeypatch.setattr(link_probe, "round_trip_s", then_reset)
    with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
        await probe(*proxy.address)


async def test_nobody_there_is_out_of_reach_at_once(ports):
    with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
        await probe("127.0.0.1", ports())
    with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
        await probe("no-such-host.invalid", 7462)


@pytest.mark.parametrize(("host", "port"), [("a..b", 7462), ("127.0.0.1", 70_000)])
async def test_what_is_no_address_is_out_of_reach(host, port):
    with pytest.raises(SollolError) as refused:
        await link_probe.probe(host, port)
    assert refused.value.refusal.reason is Reason.AGENT_UNREACHABLE


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, b"220 mail ready\r\n", b""])
async def test_what_is_no_grpc_server_is_out_of_reach(answer):
    async def other_service(reader, writer):
        await reader.read(24)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(other_service, "127.0.0.1", 0) as server:
        with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
            await probe(*server.sockets[0].getsockname())


async def test_an_agent_without_this_call_is_no_unreachable_one(ports):
    server, port = new_server(), ports()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent_pb2_grpc.AgentServiceServicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        with pytest.raises(SollolError) as refused:
            await probe("127.0.0.1", port)
        assert refused.value.refusal.reason is Reason.INTERNAL
    finally:
        await server.stop(0)


async def test_the_agent_itself_measures_and_reports_the_link(peer, proxy):
    """Asked as heads ask: here for the link to itself, through the proxy."""
    proxy.latency_s = 0.005
    host, port = proxy.address
    async with open_channel(f"{peer[0]}:{peer[1]}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        measured = await stub.MeasureLink(agent_pb2.MeasureLinkRequest(node_id="b", host=host, port=port), timeout=20)
        async with asyncio.timeout(20):
            async for response in stub.WatchReport(agent_pb2.WatchReportRequest()):
                if response.report.links:
                    break
    assert not measured.HasField("refusal")
    assert 0.01 <= measured.link.rtt_s <= 0.1
    (reported,) = response.report.links
    assert (reported.node_id, reported.rtt_s, reported.unreachable) == ("b", measured.link.rtt_s, False)
    assert measured.link.boot_id == response.report.boot_id


async def test_asking_who_answers_costs_little_and_leaves_the_turn_to_others(peer, proxy, monkeypatch):
    begun_s = time.perf_counter()
    assert [await who_answers(*peer) for _ in range(3)] == ["b"] * 3
    assert time.perf_counter() - begun_s < 2
    assert (await probe(*peer)).node_id == "b"

    proxy.freeze()
    monkeypatch.setattr(link_probe, "WHO_WITHIN_S", 0.3)
    begun_s = time.perf_counter()
    with pytest.raises(SollolError, match="AGENT_UNREACHABLE"):
        await who_answers(*proxy.address)
    assert time.perf_counter() - begun_s < 5


async def test_a_link_that_is_broken_for_a_while_is_reported_so_and_then_as_it_was(proxy, monkeypatch):
    monkeypatch.setattr(links, "RETRY_S", 0.05)
    monkeypatch.setattr(links, "LASTS_S", 0.2)
    monkeypatch.setattr(links, "JUST_NOW_S", 0.0)
    monkeypatch.setattr(link_probe, "WHO_WITHIN_S", 0.3)
    monkeypatch.setattr(ping, "WITHIN_S", 0.3)
    known = Links(probe=probe, who=who_answers)
    running = asyncio.create_task(known.run())
    try:
        before = await known.measure("b", *proxy.address)
        proxy.freeze()
        assert (await known.measure("b", *proxy.address)).unreachable
        await wait_until(lambda: known.all()[0].unreachable, what="it is reported as out of reach")
        proxy.thaw()
        await wait_until(lambda: not known.all()[0].unreachable, what="it is reported as it was")
        assert known.all()[0].rtt_s == before.rtt_s
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_two_that_send_at_once_are_counted_one_after_the_other(peer, proxy):
    proxy.bytes_per_s = 4e6  # all of it for whoever is counted, while the other's bytes wait
    async with ToxicProxy(peer).running() as other:
        other.bytes_per_s = 4e6
        both = await asyncio.gather(probe(*proxy.address), probe(*other.address))

    for found in both:
        assert 3e6 <= found.bytes_per_s <= 5e6


async def test_a_sender_that_never_ends_is_not_taken_for_longer_than_it_takes():
    padding = bytes(1 << 20)
    taken = 0

    async def read():
        nonlocal taken
        taken += len(padding)
        await asyncio.sleep(0)
        return agent_pb2.ProbeLinkRequest(padding=padding)

    assert await count(read) > 0
    assert taken == MOST_BYTES


async def test_a_link_that_falls_silent_behind_a_burst_is_no_fast_one(monkeypatch):
    monkeypatch.setattr(link_probe, "COUNTED_WITHIN_S", 0.1)
    pieces = iter([agent_pb2.ProbeLinkRequest(padding=bytes(4096))] * 2)
    times = iter([10.0, 10.001, 14.0])

    async def read():
        piece = next(pieces, None)
        return await asyncio.Event().wait() if piece is None else piece

    assert await count(read, clock=lambda: next(times)) == pytest.approx(1024)


async def test_a_sender_that_sends_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(link_probe, "COUNTED_WITHIN_S", 0.1)
    with pytest.raises(SollolError, match="STREAM_STALLED"):
        await count(asyncio.Event().wait)
