"""What an agent answers for itself: reports, and how it drains and fails."""

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sollol import wire
from sollol.channels import refusal_of
from sollol.errors import Reason, Refusal
from sollol.report import Model, Report
from sollol.v1 import agent_pb2

from tests.agent_service import lend, reason, reserve, start, status_of


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
