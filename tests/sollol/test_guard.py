"""Every call is checked against the caller's certificate, whatever kind of call it is."""

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import pytest
from sollol import guard
from sollol.certified import follow
from sollol.channels import bind, new_server, open_channel, refusal_of
from sollol.errors import Reason
from sollol.guard import Guard, caller
from sollol.identity import Role, checked
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from tests.certificates import authority, replace_file, revoke, write_identity
from tests.waiting import wait_until

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
ALLOWED = {f"/test.Test/{kind}": frozenset({Role.HEAD}) for kind in (*KINDS, "yields")}


def handlers(seen):
    """One method of each kind, which notes who called it and answers `ok`."""

    async def answer(_request, context):
        seen.append(caller(context).identity)
        return b"ok"

    async def write(_request, context):
        seen.append(caller(context).identity)
        await context.write(b"ok")

    async def yields(_request, context):
        seen.append(caller(context).identity)
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


def endless(begun, ended):
    """One method of each kind that never answers by itself; `begun` and `ended` count calls."""

    @contextmanager
    def counted():
        begun.append(1)
        try:
            yield
        finally:
            ended.append(1)

    async def answer(_request, context):
        with counted():
            await asyncio.Event().wait()

    async def reads(_request, context):
        with counted():
            while await context.read() is not grpc.aio.EOF:
                await context.write(b"more")

    async def yields(_request, context):
        with counted():
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0)

    return grpc.method_handlers_generic_handler(
        "test.Test",
        {
            "unary_unary": grpc.unary_unary_rpc_method_handler(answer),
            "stream_unary": grpc.stream_unary_rpc_method_handler(answer),
            "unary_stream": grpc.unary_stream_rpc_method_handler(yields),
            "stream_stream": grpc.stream_stream_rpc_method_handler(reads),
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
    def __init__(self, port, directory, ours, seen, told):
        self.port, self.directory, self.ours, self.seen, self.told = port, directory, ours, seen, told

    def revoke(self, name):
        revoke(self.directory / "server", self.ours, self.directory / name)

    @asynccontextmanager
    async def as_(self, role, name):
        tls = TlsFiles(write_identity(self.directory / f"{role}-{name}", self.ours, role, name))
        async with open_channel(f"127.0.0.1:{self.port}", tls.current()) as channel:
            yield channel


@asynccontextmanager
async def guarding(directory, seen, *served):
    ours = authority()
    tls = TlsFiles(write_identity(directory / "server", ours, "agent", "n1"))
    told = []
    server = new_server([Guard(tls, ALLOWED, refused=told.append)])
    server.add_generic_rpc_handlers(served)
    port = bind(server, "127.0.0.1:0", tls)
    await server.start()
    following = asyncio.create_task(follow(tls))
    yield Guarded(port, directory, ours, seen, told)
    following.cancel()
    await server.stop(0)


@pytest.fixture
async def guarded(tmp_path):
    seen = []
    async with guarding(tmp_path, seen, handlers(seen)) as started:
        yield started


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
    assert guarded.told == [Reason.WRONG_ROLE]


async def test_a_method_that_the_table_lacks_is_denied_to_everybody(guarded):
    for role in Role:
        async with guarded.as_(role, "x") as channel:
            assert await refused(channel, "unlisted") is Reason.WRONG_ROLE
    assert guarded.seen == []


async def test_a_connection_does_not_outlive_what_its_certificate_is_worth(guarded, monkeypatch):
    async with guarded.as_("head", "h") as channel:
        assert await call(channel, "unary_unary") == b"ok"
        now_s = time.time()
        monkeypatch.setattr(guard.time, "time", lambda: now_s + 91 * 86_400)
        assert await refused(channel, "unary_unary") is Reason.CERTIFICATE_EXPIRED
        monkeypatch.undo()
        assert await call(channel, "unary_unary") == b"ok"
        guarded.revoke("head-h")
        assert await refused(channel, "unary_unary") is Reason.CERTIFICATE_REVOKED


@pytest.mark.parametrize("method", KINDS)
async def test_calls_of_whoever_is_revoked_end_at_once_with_the_reason_and_those_of_others_go_on(tmp_path, method):
    begun, ended = [], []
    async with (
        guarding(tmp_path, [], endless(begun, ended)) as guarded,
        guarded.as_("head", "bad") as bad,
        guarded.as_("head", "good") as good,
    ):
        calls = {name: asyncio.create_task(endlessly(channel, method)) for name, channel in (("b", bad), ("g", good))}
        await wait_until(lambda: len(begun) == 2, what="both run")
        with capture_logs() as logs:
            guarded.revoke("head-bad")
            error = await asyncio.wait_for(calls["b"], 5)
        assert refusal_of(error).reason is Reason.CERTIFICATE_REVOKED
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        (line,) = [entry for entry in logs if entry["event"] == "peer_cut"]
        assert (line["peer"], line["reason"]) == ("head bad of test", "CERTIFICATE_REVOKED")
        await wait_until(lambda: len(ended) == 1, what="its handler has ended")
        assert not calls["g"].done()
        assert await refused(bad, "unary_unary") is Reason.CERTIFICATE_REVOKED
        calls["g"].cancel()
        await asyncio.gather(*calls.values(), return_exceptions=True)


async def endlessly(channel, method):
    """What such a call ends in."""
    try:
        made = getattr(channel, method)(f"/test.Test/{method}")
        if method.startswith("unary"):
            sent = made(b"x")
        else:
            sent = made()
            await sent.write(b"x")
        if method.endswith("unary"):
            await sent
        else:
            async for _ in sent:
                pass
    except grpc.aio.AioRpcError as error:
        return error


async def test_calls_under_an_authority_that_is_trusted_no_more_end_at_once(tmp_path):
    begun, ended, former = [], [], authority()
    async with guarding(tmp_path, [], endless(begun, ended)) as guarded:
        both = guarded.ours.certificate + former.certificate
        replace_file(tmp_path / "server" / "ca.pem", both)
        old = TlsFiles(write_identity(tmp_path / "old", former, "head", "old", trusts=both))
        new = TlsFiles(write_identity(tmp_path / "new", guarded.ours, "head", "new"))
        address = f"127.0.0.1:{guarded.port}"
        async with open_channel(address, old.current()) as before, open_channel(address, new.current()) as after:
            calls = [asyncio.create_task(endlessly(channel, "stream_stream")) for channel in (before, after)]
            await wait_until(lambda: len(begun) == 2, what="both run")
            replace_file(tmp_path / "server" / "ca.pem", guarded.ours.certificate)
            assert refusal_of(await asyncio.wait_for(calls[0], 5)).reason is Reason.FOREIGN_CERTIFICATE
            assert await refused(before, "unary_unary") is Reason.FOREIGN_CERTIFICATE
            assert not calls[1].done()
            calls[1].cancel()
            await asyncio.gather(*calls, return_exceptions=True)


async def test_a_call_that_has_ended_is_not_cut_later(guarded):
    async with guarded.as_("head", "h") as channel:
        assert await call(channel, "unary_stream") == b"ok"
        with capture_logs() as logs:
            guarded.revoke("head-h")
            await wait_until(lambda: any(entry["event"] == "certificate_followed" for entry in logs), what="followed")
        assert [entry["event"] for entry in logs] == ["certificate_followed"]


async def test_a_call_outlives_the_end_of_its_callers_certificate(tmp_path, monkeypatch):
    begun, ended = [], []
    async with guarding(tmp_path, [], endless(begun, ended)) as guarded, guarded.as_("head", "h") as channel:
        running = asyncio.create_task(endlessly(channel, "unary_unary"))
        await wait_until(lambda: begun, what="it runs")
        now_s = time.time()
        monkeypatch.setattr(guard.time, "time", lambda: now_s + 91 * 86_400)
        with capture_logs() as logs:
            write_identity(tmp_path / "other", guarded.ours, "head", "other")
            guarded.revoke("other")
            await wait_until(lambda: any(entry["event"] == "certificate_followed" for entry in logs), what="followed")
        assert await refused(channel, "unary_unary") is Reason.CERTIFICATE_EXPIRED
        assert not running.done()
        assert not ended
        running.cancel()
