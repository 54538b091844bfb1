"""The proxy does to a connection what it is told, or tests that use it prove nothing."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from tests.toxic_proxy import ToxicProxy
from tests.waiting import wait_until

KIB = 1024


@asynccontextmanager
async def echo():
    async def answer(reader, writer):
        try:
            while data := await reader.read(64 * KIB):
                writer.write(data)
                await writer.drain()
            writer.write(b"the end")
            writer.write_eof()
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, ToxicProxy(server.sockets[0].getsockname()).running() as proxy:
        yield proxy


@asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection(*proxy.address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def echoed_s(reader, writer, data=b"x"):
    begun_s = time.perf_counter()
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    return time.perf_counter() - begun_s


async def test_it_passes_bytes_and_their_end_both_ways():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        await echoed_s(reader, writer, bytes(range(256)) * 4 * KIB)
        writer.write_eof()
        assert await reader.read() == b"the end"


async def test_latency_is_added_each_way_and_jitter_never_changes_the_order():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        plain_s = min([await echoed_s(reader, writer) for _ in range(5)])
        proxy.latency_s, proxy.jitter_s = 0.02, 0.005
        assert 0.04 <= min([await echoed_s(reader, writer) for _ in range(3)]) < plain_s + 1
        await echoed_s(reader, writer, bytes(range(256)) * KIB)


async def test_the_rate_is_that_of_all_connections_together():
    async with echo() as proxy, connected(proxy) as one, connected(proxy) as other:
        proxy.bytes_per_s = 1e6
        begun_s = time.perf_counter()
        await asyncio.gather(*(echoed_s(*each, bytes(128 * KIB)) for each in (one, other)))
        assert 0.25 <= time.perf_counter() - begun_s < 3


async def test_a_slow_link_holds_its_sender_back():
    async with echo() as proxy, connected(proxy) as (_, writer):
        proxy.bytes_per_s = 1e4
        writer.write(bytes(32 << 20))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.3)


async def test_frozen_it_accepts_and_answers_nothing_until_it_thaws():
    async with echo() as proxy, connected(proxy) as before:
        await echoed_s(*before)
        proxy.freeze()
        async with connected(proxy) as after:
            for _, writer in (before, after):
                writer.write(b"?")
            await wait_until(lambda: proxy.accepted == 2, what="both are accepted")
            for reader, _ in (before, after):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.readexactly(1), 0.1)
            proxy.thaw()
            for reader, _ in (before, after):
                assert await asyncio.wait_for(reader.readexactly(1), 5) == b"?"


async def test_reset_ends_every_connection_with_an_error_and_new_ones_work():
    async with echo() as proxy:
        async with connected(proxy) as (reader, writer):
            await echoed_s(reader, writer)
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
        async with connected(proxy) as fresh:
            await echoed_s(*fresh)


async def test_where_nobody_listens_behind_it_a_connection_is_reset():
    async with ToxicProxy(("127.0.0.1", 1)).running() as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
