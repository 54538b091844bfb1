"""The forwarder as the process it is: who gets through to the backend, that every byte does, and when it ends."""

import asyncio
import hashlib
import json
import os
import random
import signal
import socket
from pathlib import Path

import psutil
import pytest

from agent.forwarder.status import NO_ADDRESS, NO_FREE_PORT, Status, StatusFile, read_status
from tests.forwarding import MIB, Forwarding, argv, ask, backend_that, echo, forwarding, is_cut
from tests.waiting import wait_until


async def test_it_tells_where_it_listens_who_is_attached_and_how_many_bytes_went(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        assert 18_500 <= forwarder.status.port < 18_600
        assert not forwarder.status.attached
        link = await forwarder.connect()
        assert await ask(link, b"hello") == b"hello"
        assert forwarder.status.attached
        assert forwarder.status.peer == "127.0.0.1"
        await wait_until(
            lambda: forwarder.status.up_bytes == forwarder.status.down_bytes == 5, what="bytes are counted"
        )
        link[1].close()
        await wait_until(lambda: not forwarder.status.attached, what="it has seen that the client left")
        assert forwarder.status.up_bytes == 5


async def test_a_second_client_is_refused_at_once_and_never_reaches_the_backend(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        first = await forwarder.connect()
        await ask(first, b"mine")
        crowd = await asyncio.gather(*(forwarder.connect() for _ in range(5)))
        for _, writer in crowd:
            writer.write(b"\x0e" + bytes(32))
        assert all(await asyncio.gather(*(is_cut(link) for link in crowd)))
        assert await ask(first, b"still mine") == b"still mine"
        assert forwarder.status.refused == 5
        assert backend.served == 1
        first[1].close()


async def test_one_connection_after_the_other_gets_through_however_close_they_follow(tmp_path: Path) -> None:
    """As a coordinator does that loads; plain sockets, so that nothing comes between one's end and the next's begin."""

    def load(port: int) -> int:
        for number in range(200):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                link.sendall(b"x" * 1000)
                got = b""
                while len(got) < 1000:
                    got += link.recv(1000)
                assert got == b"x" * 1000, number
        return 200

    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        assert await asyncio.to_thread(load, forwarder.status.port) == 200
        await wait_until(lambda: forwarder.status.connections == 200, what="all were counted")
        assert forwarder.status.refused == 0
        assert backend.most == 1


async def test_a_next_client_waits_for_a_backend_that_is_slow_to_let_go(tmp_path: Path) -> None:
    async def frees_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await echo(reader, writer)
        await asyncio.sleep(0.6)

    async with backend_that(frees_slowly) as backend, forwarding(tmp_path, backend.port) as forwarder:
        first = await forwarder.connect()
        await ask(first, b"1")
        first[1].close()
        second = await forwarder.connect()
        assert await ask(second, b"2") == b"2"
        assert forwarder.status.refused == 0
        second[1].close()


async def test_a_stranger_is_refused_and_logged(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        assert await is_cut(await forwarder.connect(source="127.0.0.2"))
        assert backend.served == 0
        await wait_until(forwarder.logged, what="it is logged")
        assert [line["peer"] for line in forwarder.logged() if line["why"] == "stranger"] == ["127.0.0.2"]
        link = await forwarder.connect()
        assert await ask(link, b"friend") == b"friend"
        assert await is_cut(await forwarder.connect(source="127.0.0.2"))
        link[1].close()


async def test_a_full_disk_cuts_no_client_when_there_is_something_to_log(tmp_path: Path) -> None:
    full = Path("/dev/full")
    async with backend_that() as backend, forwarding(tmp_path, backend.port, log=full, gone_after=0.2) as forwarder:
        link = await forwarder.connect()
        assert await ask(link, b"mine") == b"mine"
        assert await is_cut(await forwarder.connect(source="127.0.0.2"))
        assert await ask(link, b"still mine") == b"still mine"
        link[1].close()
        assert await forwarder.ended() == "coordinator_gone"


async def test_hosts_may_be_names(tmp_path: Path) -> None:
    allowed = "localhost,no-such-host.invalid"
    async with backend_that() as backend, forwarding(tmp_path, backend.port, allow=allowed) as forwarder:
        link = await forwarder.connect()
        assert await ask(link, b"x") == b"x"
        link[1].close()


async def test_it_ends_when_nobody_comes(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port, attach_within=0.2) as forwarder:
        assert await forwarder.ended() == "nobody_attached"


async def test_it_ends_some_time_after_the_last_client_left_and_not_between_two(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port, gone_after=3) as forwarder:
        for _ in range(3):  # together longer than that, each pause alone much shorter
            link = await forwarder.connect()
            await ask(link, b"x")
            link[1].close()
            await asyncio.sleep(1.1)
        assert await forwarder.ended() == "coordinator_gone"


async def test_a_term_ends_it_and_cuts_its_client(tmp_path: Path) -> None:
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        link = await forwarder.connect()
        await ask(link, b"x")
        forwarder.process.send_signal(signal.SIGTERM)
        assert await forwarder.ended(within_s=5) == "terminated"
        assert await is_cut(link)


async def test_a_backend_that_hangs_up_takes_its_last_words_through(tmp_path: Path) -> None:
    async def last_words(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"w" * MIB)

    async with backend_that(last_words) as backend, forwarding(tmp_path, backend.port) as forwarder:
        reader, writer = await forwarder.connect()
        writer.write(b"?")
        assert await asyncio.wait_for(reader.read(-1), 5) == b"w" * MIB
        writer.close()


async def test_a_client_that_ends_its_side_gets_the_rest(tmp_path: Path) -> None:
    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hashlib.sha256(await reader.read(-1)).digest())

    data = os.urandom(5 * MIB)
    async with backend_that(digest) as backend, forwarding(tmp_path, backend.port) as forwarder:
        reader, writer = await forwarder.connect()
        writer.write(data)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), 5) == hashlib.sha256(data).digest()
        writer.close()


async def test_no_backend_cuts_the_client_and_the_forwarder_stays(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with forwarding(tmp_path, nobody.getsockname()[1]) as forwarder:
            for _ in range(3):
                assert await is_cut(await forwarder.connect())
            assert forwarder.process.returncode is None


async def test_a_slow_reader_stops_the_flow_and_not_the_memory(tmp_path: Path) -> None:
    """Sixty-four mebibytes each way, into readers that read nothing at first."""
    size = 64 * MIB
    go_on = asyncio.Event()
    arrived = hashlib.sha256()

    async def stubborn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        left = size
        while left:
            data = await reader.read(1 << 16)
            arrived.update(data)
            left -= len(data)
        for _ in range(size // MIB):
            writer.write(b"d" * MIB)
            await writer.drain()

    async with backend_that(stubborn) as backend, forwarding(tmp_path, backend.port) as forwarder:
        memory = psutil.Process(forwarder.process.pid).memory_info
        before = memory().rss
        reader, writer = await forwarder.connect()
        data = random.Random(1).randbytes(MIB)
        sending = asyncio.create_task(send(writer, data, size // MIB))
        await wait_until(lambda: forwarder.status.up_bytes > 0, what="it flows")
        full = await settled_bytes(forwarder)
        assert full < size
        assert memory().rss - before < 4 * MIB
        go_on.set()
        await sending
        got = await asyncio.wait_for(reader.readexactly(size), 20)
        assert got == b"d" * size
        assert arrived.digest() == hashlib.sha256(data * (size // MIB)).digest()
        assert memory().rss - before < 4 * MIB
        writer.close()


async def send(writer: asyncio.StreamWriter, data: bytes, times: int) -> None:
    for _ in range(times):
        writer.write(data)
        await writer.drain()


async def settled_bytes(forwarder: Forwarding) -> int:
    """What has gone up when nothing more does: its status is written once a second."""
    before = -1
    while (now := forwarder.status.up_bytes) != before:
        before = now
        await asyncio.sleep(1.2)
    return now


@pytest.mark.parametrize("seed", range(3))
async def test_every_byte_arrives_once_and_in_order_whatever_the_pieces(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        reader, writer = await forwarder.connect()
        data = rng.randbytes(8 * MIB)

        async def write() -> None:
            at = 0
            while at < len(data):
                piece = rng.choice([1, 9, 100, 4096, 70_000, 500_000])
                writer.write(data[at : at + piece])
                at += piece
                if rng.random() < 0.3:
                    await writer.drain()
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        got = bytearray()
        while len(got) < len(data):
            got += await asyncio.wait_for(reader.read(rng.choice([1, 1000, 300_000])), 5)
        await writing
        assert bytes(got) == data
        writer.close()


async def test_the_kernel_is_told_to_notice_a_vanished_peer(tmp_path: Path) -> None:
    """Seen from outside: the forwarder's side of the connection has a keepalive timer."""
    async with backend_that() as backend, forwarding(tmp_path, backend.port) as forwarder:
        link = await forwarder.connect()
        await ask(link, b"x")
        port = f"{forwarder.status.port:04X}"

        def keepalive() -> str:
            """Timer 2; timer 1, a retransmission, stands there until what was sent has been acknowledged."""
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            (timer,) = [row[5] for row in rows if row[1].endswith(f":{port}") and row[3] == "01"]
            return timer if timer.startswith("02:") else ""

        timer = await wait_until(keepalive, what="the connection has a keepalive timer")
        assert int(timer[3:], 16) <= 300  # hundredths of a second
        link[1].close()


@pytest.mark.parametrize(
    ("listen", "status"), [("127.0.0.1:{taken}-{taken}", NO_FREE_PORT), ("192.0.2.1:18500-18599", NO_ADDRESS)]
)
async def test_nowhere_to_listen_has_an_exit_status_of_its_own(tmp_path: Path, listen: str, status: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = listen.format(taken=taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            *argv(tmp_path, 1, listen=listen), stderr=asyncio.subprocess.PIPE, cwd="/"
        )
        _, errors = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == status
    assert json.loads(errors)["ports"]


def test_a_status_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "status"
    assert read_status(path) is None
    StatusFile(path).write(Status(port=7, peer="127.0.0.1", up_bytes=1 << 40))
    assert read_status(path) == Status(port=7, peer="127.0.0.1", up_bytes=1 << 40)
    for odd in ("", "{", "[]", '{"port": 1, "new": 2}'):
        path.write_text(odd)
        assert read_status(path) is None
    StatusFile(tmp_path / "no" / "such" / "directory").write(Status(port=1))
