"""Which tokens say how fast a coordinator is."""

import pytest

from agent.speed_meter import MIN_TOKENS, SETTLE_S, Counters, Meter, Sample, counters_of

PAGE = b"""\
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed.
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 332
llamacpp:tokens_predicted_seconds_total 21.8225
llamacpp:predicted_tokens_seconds 15.0303
llamacpp:n_decode_total 340
llamacpp:n_busy_slots_per_decode 1.25
"""
LATER = SETTLE_S + 1


def settled() -> Meter:
    meter = Meter(ready_s=0.0)
    meter.stream_opened(LATER)
    return meter


def test_counters_are_read_from_the_engines_page():
    assert counters_of(PAGE) == Counters(332, 21.8225, 340, 425)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        PAGE.replace(b"21.8225", b"-"),
        PAGE.replace(b"1.25", b"x"),
        PAGE.replace(b"_seconds_total", b"_minutes"),
        b"<html>Not found</html>",
    ],
)
def test_a_page_without_them_says_nothing(page: bytes):
    assert counters_of(page) is None


def test_a_stream_of_enough_tokens_is_a_sample():
    assert settled().look(Counters(100, 2.0)) == Sample(100, 20.0)


def test_only_what_came_since_the_last_sample_counts():
    meter = settled()
    meter.look(Counters(100, 2.0))
    assert meter.look(Counters(150, 2.5)) == Sample(50, 10.0)


def test_few_tokens_wait_for_more():
    meter = settled()
    assert meter.look(Counters(MIN_TOKENS - 1, 1.0)) is None
    meter.stream_opened(LATER)
    assert meter.look(Counters(2 * (MIN_TOKENS - 1), 2.0)) == Sample(62, pytest.approx(2000 / 62))


def test_nothing_counts_up_to_the_look_after_a_disturbance():
    meter = settled()
    meter.disturbed()
    assert meter.look(Counters(100, 9.0)) is None
    meter.stream_opened(LATER)
    assert meter.look(Counters(200, 10.0)) == Sample(100, 10.0)


def test_few_tokens_before_a_disturbance_do_not_count_after_it():
    meter = settled()
    meter.look(Counters(20, 0.2))
    meter.disturbed()
    meter.look(Counters(120, 9.2))
    assert meter.look(Counters(152, 9.52)) == Sample(32, pytest.approx(10.0))


def test_streams_that_the_engine_ran_together_do_not_count_whoever_asked_for_them():
    meter = settled()
    assert meter.look(Counters(100, 2.0, decodes=60, slots=105)) is None
    assert meter.look(Counters(200, 3.0, decodes=165, slots=212)) == Sample(100, 10.0)


def test_a_stream_that_began_in_the_first_seconds_does_not_count():
    meter = Meter(ready_s=100.0)
    meter.stream_opened(100.0 + SETTLE_S - 0.1)
    assert meter.look(Counters(1000, 30.0)) is None
    meter.stream_opened(100.0 + SETTLE_S)
    assert meter.look(Counters(1100, 31.0)) == Sample(100, pytest.approx(10.0))


def test_what_an_old_engines_rounded_counters_cannot_tell_waits_for_more():
    meter = settled()
    meter.look(Counters(1_000_000, 20_000.0))  # printed as 1e+06 and 20000: steps of ten tokens and 0.1 s
    assert meter.look(Counters(1_000_040, 20_000.8)) is None
    assert meter.look(Counters(1_001_000, 20_020.0)) == Sample(1000, 20.0)


def test_counters_of_an_engine_without_a_clock_say_nothing():
    assert settled().look(Counters(100, 0.0)) is None
