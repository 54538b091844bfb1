"""The way from a coordinator to a backend on another node: the two processes and TLS between them."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest
from sollol.identity import Identity, Role
from sollol.tls import TlsFiles

from agent.forwarder.status import NO_FREE_PORT, NO_TLS_FILES
from agent.forwarder.tls import Pool
from sollold.pki.authority import Authority
from tests.certificates import authority, replace_file, revoke, write_identity
from tests.forwarding import (
    MIB,
    Forwarding,
    Tunnelling,
    ask,
    backend_that,
    echo,
    forwarding,
    is_cut,
    tunnelling,
    whispered_to,
)
from tests.waiting import wait_until

POOL, SECRET = "recital-5f0c1a2b", bytes(range(32))
LENDER, COORDINATOR = "node-22", "node-20"


class Nodes:
    """Two nodes' certificates, and those of whoever else a test wants."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ca = directory, authority()
        self.lender = self.of("agent", LENDER)
        self.coordinator = self.of("agent", COORDINATOR)

    def of(self, role: str, node_id: str, *, ca: Authority | None = None, **more: object) -> Path:
        where = self.directory / "pki" / f"{role}-{node_id}-{len(list(self.directory.glob('pki/*')))}"
        return write_identity(where, ca or self.ca, role, node_id, **more)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    return Nodes(tmp_path_factory.mktemp("nodes"))


@asynccontextmanager
async def lending(nodes: Nodes, directory: Path, target: int, **given: object) -> AsyncIterator[Forwarding]:
    flags = {"tls": nodes.lender, "coordinator": COORDINATOR, "pool": POOL, "secret": SECRET}
    async with forwarding(directory, target, **flags | given) as forwarder:
        yield forwarder


@asynccontextmanager
async def both(
    nodes: Nodes, directory: Path, port: int, converse=echo, *, lender: str = LENDER, gone_after: float = 20, **given
) -> AsyncIterator[tuple[Tunnelling, Forwarding]]:
    flags = {"tls": nodes.coordinator, "pool": POOL, "gone_after": gone_after, "secret": SECRET} | given
    async with (
        backend_that(converse) as backend,
        lending(nodes, directory, backend.port, gone_after=gone_after) as forwarder,
        tunnelling(directory, port, ("127.0.0.1", forwarder.status.port), lender=lender, **flags) as tunnel,
    ):
        yield tunnel, forwarder


async def test_bytes_go_through_both_ways_and_are_counted_at_both_ends(nodes, tmp_path: Path, ports) -> None:
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        link = await tunnel.connect()
        assert await ask(link, b"hello") == b"hello"
        await wait_until(lambda: tunnel.route.up_bytes == tunnel.route.down_bytes == 5, what="the tunnel counts")
        await wait_until(lambda: forwarder.status.up_bytes == forwarder.status.down_bytes == 5, what="so do forwarders")
        assert (tunnel.route.open, forwarder.status.attached) == (1, True)
        link[1].close()
        await wait_until(lambda: not forwarder.status.attached and not tunnel.route.open, what="both have seen its end")


async def test_a_large_answer_to_one_who_has_ended_their_side_arrives_whole(nodes, tmp_path: Path, ports) -> None:
    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(-1)
        writer.write(hashlib.sha256(data).digest() + data[::-1])
        await writer.drain()

    data = os.urandom(20 * MIB)
    async with both(nodes, tmp_path, ports(), digest) as (tunnel, _):
        reader, writer = await tunnel.connect()
        writer.write(data)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), 20) == hashlib.sha256(data).digest() + data[::-1]
        writer.close()


async def test_a_hundred_connections_one_after_the_other_get_through(nodes, tmp_path: Path, ports) -> None:
    """As a coordinator's that loads, which makes a dozen."""

    def load(port: int) -> int:
        for number in range(100):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                link.sendall(b"x" * 1000)
                got = b""
                while len(got) < 1000:
                    more = link.recv(1000)
                    assert more, number
                    got += more
        return 100

    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        assert await asyncio.to_thread(load, tunnel.route.port) == 100
        await wait_until(lambda: forwarder.status.connections == 100, what="all were counted")
        assert forwarder.status.refused == 0


async def test_a_slow_reader_stops_the_flow_and_not_the_memory(nodes, tmp_path: Path, ports) -> None:
    size = 64 * MIB
    go_on = asyncio.Event()

    async def stubborn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        got = hashlib.sha256()
        left = size
        while left:
            data = await reader.read(1 << 16)
            got.update(data)
            left -= len(data)
        writer.write(got.digest())
        await writer.drain()

    async with both(nodes, tmp_path, ports(), stubborn) as (tunnel, forwarder):
        before = [psutil.Process(each.process.pid).memory_info().rss for each in (tunnel, forwarder)]
        reader, writer = await tunnel.connect()
        data = os.urandom(MIB)

        async def send() -> None:
            for _ in range(size // MIB):
                writer.write(data)
                await writer.drain()

        sending = asyncio.create_task(send())
        await wait_until(lambda: forwarder.status.up_bytes > 0, what="it flows")
        await wait_until(lambda: stands_still(tunnel), within_s=10, what="it flows no more")
        assert tunnel.route.up_bytes < size
        after = [psutil.Process(each.process.pid).memory_info().rss for each in (tunnel, forwarder)]
        assert max(now - then for now, then in zip(after, before, strict=True)) < 4 * MIB
        go_on.set()
        await sending
        assert await asyncio.wait_for(reader.readexactly(32), 20) == hashlib.sha256(data * (size // MIB)).digest()
        writer.close()


async def stands_still(tunnel: Tunnelling) -> bool:
    before = tunnel.route.up_bytes
    await asyncio.sleep(1.2)  # its status is written twice a second
    return tunnel.route.up_bytes == before


@contextmanager
def knocking(port: int, files: Path | None, *, says: bytes = b"", expects: str = LENDER) -> Iterator[ssl.SSLSocket]:
    """A TLS client of our own that speaks the preamble `says`."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=5)
    if files is None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = TlsFiles(files).client_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with plain, context.wrap_socket(plain) as tls:
        if says:
            tls.sendall(says)
        yield tls


def is_let_in(port: int, files: Path | None, says: bytes) -> bool:
    try:
        with knocking(port, files, says=says + b"ping") as tls:
            return tls.recv(4) == b"ping"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("why", "who"),
    [
        ("no_certificate", lambda nodes: (None, Pool(POOL, SECRET).preamble)),
        ("foreign_certificate", lambda nodes: (nodes.of("agent", COORDINATOR, ca=authority()), b"")),
        ("certificate_expired", lambda nodes: (nodes.of("agent", COORDINATOR, expired=True), b"")),
        ("wrong_role", lambda nodes: (nodes.of("head", COORDINATOR), Pool(POOL, SECRET).preamble)),
        ("wrong_node", lambda nodes: (nodes.of("agent", "node-21"), Pool(POOL, SECRET).preamble)),
        ("wrong_secret", lambda nodes: (nodes.coordinator, Pool(POOL, bytes(32)).preamble)),
        ("wrong_pool", lambda nodes: (nodes.coordinator, Pool("another", SECRET).preamble)),
        ("wrong_pool", lambda nodes: (nodes.coordinator, b"\x0e" + bytes(71))),
        ("hung_up", lambda nodes: (nodes.coordinator, b"")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_nobody_else_gets_in_and_the_log_says_why(
    nodes: Nodes, tmp_path: Path, why: str, who: Callable[[Nodes], tuple[Path | None, bytes]]
) -> None:
    files, says = who(nodes)
    async with backend_that() as backend, lending(nodes, tmp_path, backend.port) as forwarder:
        port = forwarder.status.port
        if why == "hung_up":
            await asyncio.to_thread(lambda: knocking(port, files).__enter__().close())
        else:
            assert not await asyncio.to_thread(is_let_in, port, files, says)
        await wait_until(lambda: forwarder.status.refused == 1, what="it is counted")
        assert [line["why"] for line in forwarder.logged()] == [why]
        assert backend.served == 0
        assert await asyncio.to_thread(is_let_in, port, nodes.coordinator, Pool(POOL, SECRET).preamble)
    assert SECRET.hex() not in (tmp_path / "log").read_text()


async def test_one_who_speaks_no_tls_is_cut(nodes: Nodes, tmp_path: Path) -> None:
    async with backend_that() as backend, lending(nodes, tmp_path, backend.port) as forwarder:
        plain = await forwarder.connect()
        plain[1].write(b"\x0e" + bytes(64))
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(plain[0].read(-1), 15)  # an alert perhaps, and the end
        plain[1].close()
        await wait_until(lambda: [line["why"] for line in forwarder.logged()] == ["no_tls"], what="it is logged")
        assert backend.served == 0


async def test_a_crowd_that_says_nothing_keeps_nobody_out_and_is_cut_in_time(nodes: Nodes, tmp_path: Path) -> None:
    async with backend_that() as backend, lending(nodes, tmp_path, backend.port) as forwarder:
        crowd = [await forwarder.connect() for _ in range(30)]
        await wait_until(lambda: forwarder.status.refused >= 14, what="all but sixteen are cut at once")
        assert await is_cut(crowd[0]), "who has been silent for longest is cut first"
        assert await asyncio.to_thread(is_let_in, forwarder.status.port, nodes.coordinator, Pool(POOL, SECRET).preamble)
        assert {line["why"] for line in forwarder.logged()} == {"busy"}, "the crowd was still there"
        await wait_until(lambda: forwarder.status.refused == 30, within_s=15, what="the rest a little later")
        assert await is_cut(crowd[-1])
        assert {line["why"] for line in forwarder.logged()} == {"busy", "silent"}
        for _, writer in crowd:
            writer.close()
        assert backend.served == 1, "the one that was let in"


async def test_a_second_one_of_the_pool_is_refused_while_the_first_is_there(nodes, tmp_path: Path, ports) -> None:
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        first = await tunnel.connect()
        assert await ask(first, b"mine") == b"mine"
        assert await is_cut(await tunnel.connect())
        assert await ask(first, b"still mine") == b"still mine"
        assert [line["why"] for line in forwarder.logged()] == ["busy"]
        first[1].close()


async def test_the_secret_is_told_to_nobody_but_the_lender(nodes: Nodes, tmp_path: Path, ports) -> None:
    """At the lender's address another node of the cluster answers."""
    async with both(nodes, tmp_path, ports(), lender="node-99") as (tunnel, forwarder):
        assert await is_cut(await tunnel.connect())
        failed = await wait_until(lambda: tunnel.route.failed, what="it says why")
        assert "foreign_certificate" in failed
        assert "mismatch" in failed
        assert forwarder.status.connections == 0


async def test_the_secret_is_not_told_to_a_lender_whose_certificate_is_revoked(nodes, tmp_path: Path, ports) -> None:
    wary = nodes.of("agent", COORDINATOR)
    revoke(wary, nodes.ca, nodes.lender)
    async with both(nodes, tmp_path, ports(), tls=wary) as (tunnel, forwarder):
        assert await is_cut(await tunnel.connect())
        failed = await wait_until(lambda: tunnel.route.failed, what="it says why")
        assert "certificate_revoked" in failed
        assert forwarder.status.connections == 0


async def test_another_users_process_gets_nothing_from_a_tunnel(nodes: Nodes, tmp_path: Path, ports) -> None:
    if os.geteuid() != 0:
        pytest.fail("only root can play another user")
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(s.recv(1))"
        other = await asyncio.create_subprocess_exec(
            "/usr/bin/env", "python3", "-c", code, str(tunnel.route.port), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, user=65_534, cwd="/",
        )  # fmt: skip
        said, _ = await asyncio.wait_for(other.communicate(), 10)
        assert said in (b"b''\n", b"")
        await wait_until(lambda: tunnel.status.refused == 1, what="it is counted")
        assert [(line["why"], line["who"]) for line in tunnel.logged()] == [("other_user", "user 65534")]
        assert forwarder.status.connections == 0
        link = await tunnel.connect()
        assert await ask(link, b"x") == b"x"
        link[1].close()


async def test_the_secret_is_on_no_command_line_and_in_no_file(nodes, tmp_path: Path, ports) -> None:
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        link = await tunnel.connect()
        assert await ask(link, b"x") == b"x"
        link[1].close()
        shown = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
        for process in (tunnel, forwarder):
            shown += Path(f"/proc/{process.process.pid}/cmdline").read_bytes()
            shown += Path(f"/proc/{process.process.pid}/environ").read_bytes()
        assert SECRET not in shown
        assert SECRET.hex().encode() not in shown


async def test_a_certificate_that_is_renewed_is_used_from_the_next_connection_on(tmp_path: Path, ports) -> None:
    nodes = Nodes(tmp_path)
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        first = await tunnel.connect()
        assert await ask(first, b"old") == b"old"
        ca = authority()
        for directory, node_id in ((nodes.lender, LENDER), (nodes.coordinator, COORDINATOR)):
            new = nodes.of("agent", node_id, ca=ca)
            for name in ("ca.pem", "node.key", "node.pem"):
                replace_file(directory / name, (new / name).read_bytes())
        assert await ask(first, b"still there") == b"still there"
        first[1].close()
        await wait_until(lambda: not forwarder.status.attached, what="the first has left")
        second = await tunnel.connect()
        assert await ask(second, b"new") == b"new"
        assert [line["event"] for line in forwarder.logged()] == ["certificate_followed"]
        second[1].close()


@pytest.mark.parametrize("revoked", ["the lender", "the coordinator"])
async def test_a_connection_of_a_node_that_is_revoked_is_cut_and_opened_no_more(tmp_path, ports, revoked) -> None:
    nodes = Nodes(tmp_path)
    other, theirs, told = LENDER, nodes.lender, nodes.coordinator
    if revoked == "the coordinator":
        other, theirs, told = COORDINATOR, nodes.coordinator, nodes.lender
    async with both(nodes, tmp_path, ports()) as (tunnel, forwarder):
        link = await tunnel.connect()
        assert await ask(link, b"x") == b"x"
        revoke(told, nodes.ca, theirs)
        assert await is_cut(link, within_s=5)
        end = tunnel if revoked == "the lender" else forwarder
        (line,) = [line for line in end.logged() if line["event"] == "peer_cut"]
        assert (line["reason"], line["peer"]) == ("CERTIFICATE_REVOKED", f"agent {other} of test")
        assert await is_cut(await tunnel.connect(), within_s=5)
        if revoked == "the lender":
            await wait_until(lambda: "certificate_revoked" in tunnel.route.failed, what="it says why")
        else:
            await wait_until(lambda: forwarder.status.refused == 1, what="the next one is refused")
            assert forwarder.logged()[-1]["why"] == "certificate_revoked"


async def test_a_killed_tunnel_ends_the_forwarder_and_a_killed_forwarder_the_link(nodes, tmp_path: Path, ports) -> None:
    async with both(nodes, tmp_path, ports(), gone_after=0.5) as (tunnel, forwarder):
        link = await tunnel.connect()
        await ask(link, b"x")
        tunnel.process.kill()
        assert await is_cut(link)
        assert await forwarder.ended() == "coordinator_gone"
    again = tmp_path / "again"
    again.mkdir()
    async with both(nodes, again, ports(), gone_after=0.5) as (tunnel, forwarder):
        link = await tunnel.connect()
        await ask(link, b"x")
        forwarder.process.kill()
        assert await is_cut(link)
        assert await tunnel.ended() == "coordinator_gone"


async def test_a_tunnel_that_cannot_reach_its_backend_cuts_at_once_and_says_why(nodes, tmp_path: Path, ports) -> None:
    flags = {"tls": nodes.coordinator, "pool": POOL, "secret": SECRET}
    async with tunnelling(tmp_path, ports(), ("127.0.0.1", ports()), lender=LENDER, **flags) as tunnel:
        assert await is_cut(await tunnel.connect())
        await wait_until(lambda: "Connection refused" in tunnel.route.failed, what="it says why")
        tunnel.process.send_signal(signal.SIGTERM)
        assert await tunnel.ended() == "terminated"


async def test_without_usable_credentials_neither_end_starts(nodes: Nodes, tmp_path: Path, ports) -> None:
    argv = ["--attach-within", "1", "--gone-after", "1", "--status", str(tmp_path / "s"), "--pool", POOL]
    ends = {
        "agent.forwarder": ["--listen", f"127.0.0.1:{ports()}", "--target", "127.0.0.1:1"],
        "agent.tunnel": ["--route", f"{ports()}=127.0.0.1:1={LENDER}"],
    }
    for tls, secret in ((tmp_path, SECRET), (nodes.lender, b""), (nodes.lender, SECRET + b"x")):
        for module, more in ends.items():
            status, said = await run(secret, module, *argv, *more, "--tls", str(tls))
            assert (status, b'"no_tls"' in said) == (NO_TLS_FILES, True), said


async def test_a_tunnel_whose_port_is_taken_says_so(nodes: Nodes, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        route = f"{taken.getsockname()[1]}=127.0.0.1:1={LENDER}"
        argv = ["--attach-within", "1", "--gone-after", "1", "--status", str(tmp_path / "s"), "--pool", POOL]
        argv += ["--tls", str(nodes.coordinator), "--route", route]
        assert (await run(SECRET, "agent.tunnel", *argv))[0] == NO_FREE_PORT


async def run(told: bytes, module: str, *argv: str) -> tuple[int | None, bytes]:
    pipe = asyncio.subprocess.PIPE
    process = await whispered_to(told, sys.executable, "-P", "-m", module, *argv, stderr=pipe)
    _, said = await asyncio.wait_for(process.communicate(), 10)
    return process.returncode, said


def test_a_name_in_a_certificate_is_compared_without_its_case() -> None:
    """DNS names are lower case, node ids need not be: two ids that differ in case only are told apart by the URI."""
    assert Identity("test", Role.AGENT, "BigBox").dns_name == "bigbox.agent.sollol"


async def test_a_tunnel_whose_coordinator_leaves_while_somebody_is_being_refused_ends_too(
    nodes: Nodes, tmp_path: Path, ports
) -> None:
    """Whoever has gone before they are looked at belongs to no user: they are refused, a moment after both came."""
    async with both(nodes, tmp_path, ports(), gone_after=0.3) as (tunnel, _):
        port = tunnel.route.port
        with socket.create_connection(("127.0.0.1", port)) as engine, socket.socket() as gone:
            engine.sendall(b"x")
            assert await asyncio.to_thread(engine.recv, 1) == b"x"
            tunnel.process.send_signal(signal.SIGSTOP)
            gone.connect(("127.0.0.1", port))
            for each in (gone, engine):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()
            tunnel.process.send_signal(signal.SIGCONT)
        assert await tunnel.ended(within_s=10) == "coordinator_gone"
        assert tunnel.status.refused == 1
