"""Every call is checked against the caller's certificate, whatever kind of call it is."""

import time
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from sollol import guard
from sollol.channels import bind, new_server, open_channel, refusal_of
from sollol.errors import Reason
from sollol.guard import Guard, caller
from sollol.identity import Role, checked
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from tests.certificates import authority, replace_file, write_identity

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
ALLOWED = {f"/test.Test/{kind}": frozenset({Role.HEAD}) for kind in (*KINDS, "yields")}


def handlers(seen, tls):
    """One method of each kind, which notes who called it and answers `ok`."""

    async def answer(_request, context):
        seen.append(caller(context, tls))
        return b"ok"

    async def write(_request, context):
        seen.append(caller(context, tls))
        await context.write(b"ok")

    async def yields(_request, context):
        seen.append(caller(context, tls))
        yield b"ok"

    return grpc.method_handlers_generic_handler(
        "test.Test",
        {
            "unary_unary": grpc.unary_unary_rpc_method_handler(answer),
            "stream_unary": grpc.stream_unary_rpc_method_handler(answer),
            "unary_stream": grpc.unary_stream_rpc_method_handler(write),
            "stream_stream": grpc.stream_stream_rpc_method_handler(write),
            "yields": grpc.unary_stream_rpc_method_handler(yields),
            "unlisted": grpc.unary_unary_rpc_method_handler(answer),
        },
    )


async def call(channel, method):
    """What a method answers."""
    kind = "unary_stream" if method == "yields" else "unary_unary" if method == "unlisted" else method
    made = getattr(channel, kind)(f"/test.Test/{method}")
    sent = made(b"x") if kind.startswith("unary") else made(iter([b"x"]))
    return await sent if kind.endswith("unary") else b"".join([part async for part in sent])


async def refused(channel, method):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, method)
    return refusal_of(raised.value).reason


class Guarded:
    def __init__(self, port, directory, ours, seen):
        self.port, self.directory, self.ours, self.seen = port, directory, ours, seen

    @asynccontextmanager
    async def as_(self, role, name):
        tls = TlsFiles(write_identity(self.directory / f"{role}-{name}", self.ours, role, name))
        async with open_channel(f"127.0.0.1:{self.port}", tls.current()) as channel:
            yield channel


@pytest.fixture
async def guarded(tmp_path):
    ours, seen = authority(), []
    tls = TlsFiles(write_identity(tmp_path / "server", ours, "agent", "n1"))
    server = new_server([Guard(tls, ALLOWED)])
    server.add_generic_rpc_handlers((handlers(seen, tls),))
    port = bind(server, "127.0.0.1:0", tls)
    await server.start()
    yield Guarded(port, tmp_path, ours, seen)
    await server.stop(0)


@pytest.mark.parametrize("method", [*KINDS, "yields"])
async def test_who_may_call_gets_through_and_who_may_not_hears_why(guarded, method):
    async with guarded.as_("head", "h") as channel:
        assert await call(channel, method) == b"ok"
    assert guarded.seen == [checked("test", "head", "h")]
    async with guarded.as_("client", "c") as channel:
        with capture_logs() as logs:
            assert await refused(channel, method) is Reason.WRONG_ROLE
    assert guarded.seen == [checked("test", "head", "h")]
    (line,) = [entry for entry in logs if entry["event"] == "peer_refused"]
    assert (line["reason"], line["method"]) == ("WRONG_ROLE", f"/test.Test/{method}")
    assert line["peer"].startswith("ipv4:127.0.0.1:")


async def test_a_method_that_the_table_lacks_is_denied_to_everybody(guarded):
    for role in Role:
        async with guarded.as_(role, "x") as channel:
            assert await refused(channel, "unlisted") is Reason.WRONG_ROLE
    assert guarded.seen == []


async def test_a_connection_does_not_outlive_what_its_certificate_is_worth(guarded, monkeypatch):
    async with guarded.as_("head", "h") as channel:
        assert await call(channel, "unary_unary") == b"ok"
        replace_file(guarded.directory / "server" / "revoked", b"head/h\n")
        assert await refused(channel, "unary_unary") is Reason.CERTIFICATE_REVOKED
        replace_file(guarded.directory / "server" / "revoked", b"")
        assert await call(channel, "unary_unary") == b"ok"
        now_s = time.time()
        monkeypatch.setattr(guard.time, "time", lambda: now_s + 91 * 86_400)
        assert await refused(channel, "unary_unary") is Reason.CERTIFICATE_EXPIRED
