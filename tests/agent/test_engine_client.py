import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine_client import MAX_HEAD_BYTES, EngineProtocolError, ResponseReader, request_bytes

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(data) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start != end]


def read(pieces: list[bytes]) -> tuple[ResponseReader, bytes]:
    reader = ResponseReader()
    return reader, b"".join(reader.feed(piece) for piece in pieces)


def chunked(parts: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    return CHUNKED_HEAD + body + b"0\r\n" + trailer + b"\r\n"


@given(
    st.lists(st.binary(min_size=1, max_size=80), max_size=6),
    st.lists(st.integers(min_value=0, max_value=10_000), max_size=12),
    st.sampled_from([b"", b";name=value", b" "]),
    st.sampled_from([b"", b"X-Trailer: 1\r\n"]),
)
def test_chunked_bodies_read_the_same_wherever_they_are_cut(parts, places, extension, trailer):
    wire = chunked(parts, extension=extension, trailer=trailer)
    reader, body = read(cut(wire, places))
    assert (reader.status, reader.complete, body) == (200, True, b"".join(parts))


@given(st.binary(max_size=200), st.lists(st.integers(min_value=0, max_value=1000), max_size=8))
def test_counted_bodies_read_the_same_wherever_they_are_cut(body, places):
    wire = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    reader, got = read(cut(wire, places))
    assert (reader.status, reader.complete, got) == (404, True, body)


def test_every_single_byte_split_reads_the_same():
    wire = chunked([b"data: {}\n\n", b"x" * 300])
    reader, body = read([bytes([byte]) for byte in wire])
    assert reader.complete
    assert body == b"data: {}\n\n" + b"x" * 300


@given(st.binary(max_size=300), st.lists(st.integers(min_value=0, max_value=300), max_size=5))
def test_any_bytes_are_read_or_refused_and_nothing_else(data, places):
    reader = ResponseReader()
    try:
        for piece in cut(CHUNKED_HEAD + data, places):
            reader.feed(piece)
    except EngineProtocolError:
        return


@pytest.mark.parametrize("length", range(len(chunked([b"hello", b"world"]))))
def test_a_response_cut_short_is_never_complete(length):
    reader, _ = read([chunked([b"hello", b"world"])[:length] or b""])
    assert not reader.complete


def test_interim_responses_are_skipped():
    reader, body = read([b"HTTP/1.1 100 Continue\r\n\r\n" + chunked([b"x"])])
    assert (reader.status, body, reader.complete) == (200, b"x", True)


def test_header_names_come_in_lower_case():
    reader, _ = read([CHUNKED_HEAD])
    assert reader.headers["content-type"] == "text/event-stream"


def test_a_response_without_content_is_complete_with_its_head():
    reader, body = read([b"HTTP/1.1 204 No Content\r\n\r\n"])
    assert (reader.complete, body) == (True, b"")


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",  # only the end of the connection would end it
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: header\r\n\r\n",
        CHUNKED_HEAD + b"0x5\r\nhello\r\n",
        CHUNKED_HEAD + b"+5\r\nhello\r\n",
        CHUNKED_HEAD + b"1_0\r\nhello\r\n",
        CHUNKED_HEAD + b"\r\nhello\r\n",
        CHUNKED_HEAD + b"fffffffff\r\n",
        CHUNKED_HEAD + b"5\r\nhelloXX",
        CHUNKED_HEAD + b"5;" + b"e" * 2000,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * MAX_HEAD_BYTES,
    ],
)
def test_damaged_responses_are_refused(wire):
    with pytest.raises(EngineProtocolError):
        read([wire])


def test_requests_ask_the_engine_to_close_and_say_their_length():
    wire = request_bytes("POST", "/completion", {"content-type": "application/json"}, b"{}")
    assert wire == (
        b"POST /completion HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
        b"content-type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )
