from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, Refusal

from agent.outbox import BATCH_BYTES, MAX_CREDIT_BYTES, Lane, Outbox

DIED = Refusal(reason=Reason.ENGINE_DIED, message="gone")


def frames_of(outbox):
    """Every frame due now, as (stream, kind, content)."""
    found, more = [], bool(outbox)
    while more:
        batch, more = outbox.take()
        found += [(f.stream, f.WhichOneof("frame"), getattr(f, f.WhichOneof("frame"))) for f in batch.frames]
    return found


def test_data_of_one_stream_leaves_joined_after_its_head_and_before_its_end():
    ended = []
    outbox, lane = Outbox(on_end=ended.append), Lane(7, 1000)
    outbox.head(lane, 200, {})
    outbox.data(lane, b"one ")
    outbox.data(lane, b"two")
    outbox.end(lane, None)
    frames = frames_of(outbox)
    assert [(stream, kind) for stream, kind, _ in frames] == [(7, "head"), (7, "data"), (7, "end")]
    assert frames[1][2] == b"one two"
    assert not frames[2][2].HasField("refusal")
    assert ended == [7]
    assert not outbox


def test_data_beyond_the_credit_waits_and_holds_the_end_back():
    outbox, lane = Outbox(on_end=lambda _: None), Lane(1, 4)
    outbox.data(lane, b"abcdef")
    outbox.end(lane, None)
    assert not lane.room
    assert [content for _, _, content in frames_of(outbox)] == [b"abcd"]
    outbox.grant(lane, 10)
    assert [kind for _, kind, _ in frames_of(outbox)] == ["data", "end"]


def test_an_end_that_drops_data_does_not_wait_for_credit():
    outbox, lane = Outbox(on_end=lambda _: None), Lane(1, 2)
    outbox.data(lane, b"abcdef")
    outbox.end(lane, None)
    outbox.end(lane, DIED, drop_data=True)
    [(_, kind, end)] = frames_of(outbox)
    assert kind == "end"
    assert end.refusal.message == "gone"


def test_the_first_end_stays():
    outbox, lane = Outbox(on_end=lambda _: None), Lane(1, 2)
    outbox.end(lane, DIED)
    outbox.end(lane, None)
    [(_, _, end)] = frames_of(outbox)
    assert end.HasField("refusal")
    outbox.end(lane, DIED, drop_data=True)
    assert not outbox


def test_a_batch_stops_growing_and_the_rest_goes_first_next_time():
    outbox = Outbox(on_end=lambda _: None)
    for number in range(4):
        outbox.data(Lane(number, MAX_CREDIT_BYTES), b"x" * (BATCH_BYTES // 2))
    first, more = outbox.take()
    assert [frame.stream for frame in first.frames] == [0, 1]
    assert more
    second, more = outbox.take()
    assert [frame.stream for frame in second.frames] == [2, 3]
    assert not more


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.integers(min_value=0, max_value=60)), max_size=40))
def test_whatever_comes_no_byte_is_lost_reordered_or_sent_beyond_credit(events):
    outbox, lane = Outbox(on_end=lambda _: None), Lane(1, 10)
    sent, got, granted = b"", b"", 10
    for event in events:
        if isinstance(event, bytes):
            outbox.data(lane, event)
            sent += event
        else:
            outbox.grant(lane, event)
            granted += event
        got += b"".join(content for _, _, content in frames_of(outbox))
        assert len(got) == min(granted, len(sent))
    assert got == sent[: len(got)]
