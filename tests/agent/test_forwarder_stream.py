"""A machine that is gone is told from one that is slow."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from agent.forwarder import link as link_module
from agent.forwarder import stream
from agent.forwarder.link import Link
from agent.forwarder.loop import Loop
from agent.forwarder.stream import BLOCKED, Opening, Plain, Stream, has_vanished, notice_a_vanished_peer
from tests.waiting import wait_until


def tcp_info(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)


async def test_a_peer_that_is_there_and_does_not_read_has_not_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_UNACKNOWLEDGED_MS", 200)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        notice_a_vanished_peer(sender)
        sender.connect(listener.getsockname())
        sender.setblocking(False)
        with listener.accept()[0]:
            while Plain(sender).send(memoryview(bytes(1 << 16))) != BLOCKED:
                pass
            looks = []

            def asked_thrice() -> bool:
                """Whether the kernel has asked three times if it may go on; the pauses double."""
                looks.append(has_vanished(sender))
                return tcp_info(sender)[4] >= 3

            await wait_until(asked_thrice, within_s=30, what="the kernel asks a peer that does not read")
    assert not any(looks)


@pytest.mark.parametrize(
    ("retransmits", "probes", "last_ack_ms", "vanished"),
    [
        (0, 0, 100_000, False),  # nothing is owed, or the peer has just refused to take more
        (5, 0, 7_900, False),
        (5, 0, 8_000, True),
        (0, 1, 60_000, False),  # the answer is on its way
        (0, 3, 60_000, True),
    ],
)
def test_who_owes_an_acknowledgement_for_eight_seconds_has_vanished(
    retransmits: int, probes: int, last_ack_ms: int, vanished: bool
) -> None:
    info = bytes((1, 0, retransmits, probes)) + bytes(52) + last_ack_ms.to_bytes(4, "little")
    assert has_vanished(SimpleNamespace(getsockopt=lambda *_: info)) is vanished


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    for each in (made._woken, made._wakes, made._epoll):
        each.close()


def opened(connection: socket.socket) -> Opening[Stream]:
    connection.setblocking(False)
    return Plain(connection)
    yield


@pytest.mark.parametrize("gone", ["near", "far"])
def test_a_link_to_a_machine_that_is_gone_is_ended_and_says_which_end_it_was(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    (near, client), (far, backend) = socket.socketpair(), socket.socketpair()
    ended: list[Link] = []

    def arrived(link: Link) -> None:
        link.pump(opened(far))
        loop.soon(loop.end)

    link = Link(loop, "peer", opened(near), on_arrived=arrived, on_end=ended.append)
    loop.run()
    monkeypatch.setattr(link_module, "has_vanished", lambda _: False)
    link.look()
    assert not ended
    monkeypatch.setattr(link_module, "has_vanished", lambda connection: connection is (near if gone == "near" else far))
    link.look()

    assert ended == [link]
    assert (link.peer_vanished, "Connection timed out" in link.failed) == (gone == "near", gone == "far")
    assert (client.recv(1), backend.recv(1)) == (b"", b"")
    client.close()
    backend.close()
