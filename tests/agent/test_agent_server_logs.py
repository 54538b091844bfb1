"""The logs of engines as an agent hands them out over gRPC."""

import asyncio

from sollol.report import Instance, InstanceState
from sollol.v1 import agent_pb2

from tests.agent_service import reason
from tests.waiting import wait_until


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
