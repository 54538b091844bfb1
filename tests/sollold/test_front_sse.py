import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import SollolError

from sollold.front import sse
from sollold.front.sse import Ending, EventReader, Passage
from tests.fakes.fake_dispatcher import HELLO, chat_frame


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


texts = st.lists(st.text(), max_size=8)
cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(texts, cuts, st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_their_bytes_are_cut(words, places, newline):
    body = b"".join(
        b": ping" + newline + newline + b"data: " + json.dumps(word, ensure_ascii=False).encode() + newline + newline
        for word in words
    )
    reader = EventReader()
    found = [data for chunk in cut(body, places) for data in reader.feed(chunk)]
    assert [json.loads(data) for data in found] == words


def test_an_event_of_several_lines_is_joined_and_other_fields_are_ignored():
    body = b"event: x\nid: 3\ndata: one\ndata:two\nretry: 5\n\n\n\n:\n\ndata: left over"
    assert EventReader().feed(body) == [b"one\ntwo"]


def test_an_endless_event_is_refused():
    reader = EventReader()
    for _ in range(sse.MAX_EVENT_BYTES // 65_536):
        assert reader.feed(b"x" * 65_536) == []
    with pytest.raises(SollolError, match="more than"):
        reader.feed(b"x")


@given(texts, cuts, st.sampled_from([b"\n", b"\r\n"]))
def test_a_complete_stream_passes_unchanged_however_it_is_cut(words, places, newline):
    body = b"".join(chat_frame({"content": word}) for word in words) + b":\n\ndata: [DONE]\n\n"
    body = body.replace(b"\n", newline)
    passage = Passage()
    sent = b"".join(passage.feed(chunk) for chunk in cut(body, places))
    rest, ending = passage.finish()
    assert (sent + rest, ending) == (body, Ending.DONE)


@given(texts, cuts, st.integers(1, 60))
def test_a_stream_cut_short_passes_whole_events_only_and_is_found_truncated(words, places, missing):
    frames = [chat_frame({"content": word}) for word in ["data: [DONE]", *words, '{"error":']]
    body = b"".join(frames)[:-missing]
    passage = Passage()
    sent = b"".join(passage.feed(chunk) for chunk in cut(body, places))
    rest, ending = passage.finish()
    assert (rest, ending) == (b"", Ending.TRUNCATED)
    assert sent == b"".join(frames[:-1])


def test_the_engines_own_error_event_ends_a_stream_too():
    passage = Passage()
    for chunk in (*HELLO[:2], b'data: {"error":{"code":500,"message":"x"}}\n\n', b":\n\n"):
        assert passage.feed(chunk) == chunk
    assert passage.finish() == (b"", Ending.ERROR)


def test_a_terminal_event_without_its_last_newline_counts():
    passage = Passage()
    assert passage.feed(b"data: {}\n\ndata: [DONE]\n") == b"data: {}\n\n"
    assert passage.finish() == (b"data: [DONE]\n\n", Ending.DONE)


def test_an_empty_stream_is_truncated():
    assert Passage().finish() == (b"", Ending.TRUNCATED)


def test_a_comment_cannot_break_out_of_its_line():
    assert sse.comment("loading\r\ndata: x") == b": loading  data: x\n\n"
