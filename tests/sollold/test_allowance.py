import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.allowance import Allowance


def test_a_full_bucket_admits_at_once():
    assert Allowance(60, 0.0).wait_s(0.0) == 0


def test_an_empty_one_says_when_the_next_token_is_there():
    bucket = Allowance(60, 0.0)
    bucket.charge(60, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    assert bucket.wait_s(0.5) == pytest.approx(0.5)
    assert bucket.wait_s(1.0) == 0


def test_what_was_used_beyond_the_limit_is_waited_for():
    bucket = Allowance(60, 0.0)
    bucket.charge(180, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(121.0)


def test_it_never_holds_more_than_a_minutes_worth():
    bucket = Allowance(60, 0.0)
    bucket.charge(-500, 3600.0)
    bucket.charge(60, 7200.0)
    assert bucket.wait_s(7200.0) > 0


def test_what_is_given_back_can_be_used_again():
    bucket = Allowance(60, 0.0)
    bucket.charge(100, 0.0)
    bucket.charge(-80, 0.0)
    assert bucket.wait_s(0.0) == 0


def test_another_limit_keeps_what_was_used():
    bucket = Allowance(60, 0.0)
    bucket.charge(60, 0.0)
    bucket.limit(600, 0.0)
    assert bucket.wait_s(0.0) == 0
    bucket.charge(540, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(0.1)
    bucket.limit(60, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(541.0)


def test_a_clock_that_goes_back_gives_nothing():
    bucket = Allowance(60, 100.0)
    bucket.charge(60, 100.0)
    assert bucket.wait_s(50.0) == pytest.approx(1.0)
    assert bucket.wait_s(101.0) == 0


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5000)), max_size=50),
)
def test_whoever_waits_as_told_uses_no_more_than_the_limit_and_one_request(per_minute, steps):
    bucket, now_s, used = Allowance(per_minute, 0.0), 0.0, 0
    largest = max((tokens for _, tokens in steps), default=0)
    for pause_s, tokens in steps:
        now_s += pause_s + bucket.wait_s(now_s + pause_s)
        assert used <= per_minute + per_minute * now_s / 60 + largest
        bucket.charge(tokens, now_s)
        used += tokens
