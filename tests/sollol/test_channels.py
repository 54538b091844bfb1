import asyncio

import grpc
import grpc.aio
import pytest
from sollol.channels import SERVER_OPTIONS, new_server, open_channel, refusal_abort, refusal_of, write_whole
from sollol.errors import SURFACES, Reason, Refusal, Retry
from sollol.v1 import agent_pb2, agent_pb2_grpc, common_pb2


async def raised_by(tmp_path, refusal):
    """What a caller gets when a server aborts with `refusal`."""

    class Servicer(agent_pb2_grpc.AgentServiceServicer):
        async def GetReport(self, request, context):  # noqa: N802 - gRPC's name
            await refusal_abort(context, refusal)

    server = new_server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with open_channel(f"unix:{tmp_path}/s") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await agent_pb2_grpc.AgentServiceStub(channel).GetReport(agent_pb2.GetReportRequest())
            return raised.value
    finally:
        await server.stop(0)


async def test_a_refusal_comes_back_as_it_was_sent(tmp_path):
    refusal = Refusal(
        reason=Reason.MEMORY_SHORT,
        message="4 GiB missing on ünit",
        retry=Retry.RETRYABLE,
        numbers={"needed_bytes": 1 << 40},
        retry_after_s=1.5,
        log_lines=("one", "two"),
    )
    error = await raised_by(tmp_path, refusal)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == refusal.message
    assert dict(error.trailing_metadata())["sollol-reason"] == "MEMORY_SHORT"
    assert refusal_of(error) == refusal


async def test_a_refusal_too_large_for_a_trailer_loses_its_oldest_log_lines(tmp_path):
    lines = tuple(f"{number} " + "x" * 400 for number in range(60))
    refusal = Refusal(reason=Reason.ENGINE_DIED, message="m" * 9000, log_lines=lines)
    found = refusal_of(await raised_by(tmp_path, refusal))
    assert found.reason is Reason.ENGINE_DIED
    assert found.log_lines
    assert found.log_lines == lines[-len(found.log_lines) :]


def test_every_reason_has_a_grpc_status():
    for surface in SURFACES.values():
        assert surface.grpc_status in grpc.StatusCode.__members__


async def test_a_server_that_is_not_there_is_agent_unreachable(tmp_path):
    async with open_channel(f"unix:{tmp_path}/nobody") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await agent_pb2_grpc.AgentServiceStub(channel).GetReport(agent_pb2.GetReportRequest(), timeout=5)
    refusal = refusal_of(raised.value, "agent n1")
    assert refusal.reason is Reason.AGENT_UNREACHABLE
    assert refusal.retry is Retry.RETRYABLE
    assert "agent n1" in refusal.message


def error_with(code, trailers=()):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details="why")


@pytest.mark.parametrize("trailers", [(), (("sollol-refusal-bin", b"\xff\xff"),), (("sollol-refusal-bin", b""),)])
def test_a_bug_of_the_peer_is_internal_even_with_unreadable_trailers(trailers):
    assert refusal_of(error_with(grpc.StatusCode.UNKNOWN, trailers)).reason is Reason.INTERNAL


@pytest.mark.parametrize("retry", [Retry.RETRYABLE, Retry.FATAL])
def test_a_newer_peers_reason_is_named_and_its_word_on_trying_again_holds(retry):
    """The status of such a refusal may be UNAVAILABLE: the peer was reached all the same."""
    sent = common_pb2.Refusal(reason=9999, retry=common_pb2.Retry.Value(f"RETRY_{retry.value}"), message="why")
    trailers = (("sollol-reason", "MOON_FULL"), ("sollol-refusal-bin", sent.SerializeToString()))
    refusal = refusal_of(error_with(grpc.StatusCode.UNAVAILABLE, trailers), "agent n1")
    assert (refusal.reason, refusal.retry) == (Reason.INTERNAL, retry)
    assert refusal.message == "agent n1 refused with 'MOON_FULL', which this version does not know: why"


async def test_a_connection_lost_in_the_middle_of_a_write_is_agent_unreachable_and_no_bug(tmp_path):
    for number in range(200):
        if reason := await reason_of_a_write_to_a_lost_server(f"unix:{tmp_path}/{number}"):
            break

    assert reason is Reason.AGENT_UNREACHABLE


async def reason_of_a_write_to_a_lost_server(address):
    """None when gRPC noticed the loss before the write did, which is a matter of luck."""

    class Servicer(agent_pb2_grpc.AgentServiceServicer):
        async def Relay(self, request_iterator, context):  # noqa: N802 - gRPC's name
            await asyncio.Event().wait()

    server = new_server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(address)
    await server.start()
    async with open_channel(address) as channel:
        call = agent_pb2_grpc.AgentServiceStub(channel).Relay()
        await call.write(agent_pb2.RelayRequest())
        stopping = asyncio.create_task(server.stop(0))
        try:
            while True:
                await call.write(agent_pb2.RelayRequest())
        except asyncio.InvalidStateError:
            return None
        except grpc.aio.AioRpcError as error:
            return refusal_of(error).reason
        finally:
            await stopping


async def test_two_servers_cannot_share_a_port():
    assert ("grpc.so_reuseport", 0) in SERVER_OPTIONS
    first, second = new_server(), new_server()
    port = next(port for port in range(21400, 21500) if _bound(first, port))
    assert not _bound(second, port)
    await first.stop(0)
    await second.stop(0)


def _bound(server, port):
    try:
        return bool(server.add_insecure_port(f"127.0.0.1:{port}"))
    except RuntimeError:
        return False


async def test_a_call_that_is_cancelled_in_mid_write_still_ends_with_its_refusal(tmp_path):
    """GRPC takes no status while it takes a message; it would end the call with an error of its own."""
    again = Refusal(reason=Reason.AGENT_RESTARTING, message="come again", retry=Retry.RETRYABLE)

    async def write(context):
        while True:
            await write_whole(context, agent_pb2.WatchReportResponse(models_unchanged=True))

    class Servicer(agent_pb2_grpc.AgentServiceServicer):
        async def WatchReport(self, request, context):  # noqa: N802 - gRPC's name
            writing = asyncio.create_task(write(context))
            await asyncio.sleep(0)  # it has begun
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await refusal_abort(context, again)

    server = new_server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with open_channel(f"unix:{tmp_path}/s") as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            for _ in range(50):
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    _ = [told async for told in stub.WatchReport(agent_pb2.WatchReportRequest())]
                assert refusal_of(ended.value) == again
    finally:
        await server.stop(0)
