import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.supervisor.progress import newest_percent, percent_of


def line(state: str, **payload: object) -> bytes:
    return b"cmd_child_to_router:state:" + json.dumps({"state": state, "payload": payload}).encode()


def test_one_stage_counts_from_0_to_100() -> None:
    assert percent_of(line("loading", stages=["text_model"], current="text_model", value=0.25)) == 25


def test_each_stage_counts_the_same() -> None:
    stages = ["text_model", "mmproj_model"]
    assert percent_of(line("loading", stages=stages, current="text_model", value=1.0)) == 50
    assert percent_of(line("loading", stages=stages, current="mmproj_model", value=0.5)) == 75


def test_ready_is_100() -> None:
    assert percent_of(line("ready", id="m", meta={"n_vocab": 768})) == 100


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"hello",
        b"cmd_child_to_router:state:",
        b"cmd_child_to_router:state:{",
        b"cmd_child_to_router:state:[1]",
        b"cmd_child_to_router:state:\xff\xfe",
        line("sleeping"),
        line("loading", value="much"),
        b'cmd_child_to_router:state:{"state":"loading"}',
        b"cmd_child_to_router:other:{}",
    ],
)
def test_a_line_that_is_not_understood_says_nothing(text: bytes) -> None:
    assert percent_of(text) is None


def test_a_value_out_of_range_is_clamped() -> None:
    assert percent_of(line("loading", current="x", value=7)) == 100
    assert percent_of(line("loading", current="x", value=-1)) == 0


def test_an_unknown_current_stage_counts_as_the_first() -> None:
    assert percent_of(line("loading", stages=["a", "b"], current="c", value=0.5)) == 25


def test_the_newest_whole_line_counts_and_half_a_line_is_read_again() -> None:
    first, second = (line("loading", stages=["a"], current="a", value=value) for value in (0.1, 0.2))
    output = b"\n" + first + b"\n\n" + second + b"\n" + second[:20]
    assert newest_percent(output) == (20, len(output) - 20)


@given(st.binary(max_size=300))
def test_no_output_breaks_it(output: bytes) -> None:
    percent, whole = newest_percent(output)
    assert percent is None or 0 <= percent <= 100
    assert whole == output.rfind(b"\n") + 1
