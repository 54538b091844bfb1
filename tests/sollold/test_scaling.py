"""When another pool is loaded: the whole table."""

from itertools import product

import pytest

from sollold.scaling import EXTRA_RETRY_FIRST_S, EXTRA_RETRY_MOST_S, Demand, LoadFor, extra_retry_s, load_for

REQUESTS, OPERATOR = LoadFor.REQUESTS, LoadFor.OPERATOR


def whose(*, waiting=False, asked=0, ready=0, to_come=0, limit=1, held_off=False):
    demand = Demand(waiting=waiting, asked=asked, ready=ready, to_come=to_come, limit=limit, held_off=held_off)
    return load_for(demand)


def test_a_cold_model_is_loaded_when_somebody_waits_and_only_then():
    assert whose(waiting=True) is REQUESTS
    assert whose(asked=1) is OPERATOR
    assert whose() is None


def test_a_first_pool_is_never_held_off():
    assert whose(waiting=True, held_off=True) is REQUESTS


def test_requests_bring_up_pools_to_their_limit_and_operators_beyond_it():
    assert [whose(waiting=True, ready=ready, limit=2) for ready in (1, 2, 3)] == [REQUESTS, None, None]
    assert [whose(asked=3, ready=ready, limit=1) for ready in (1, 2, 3)] == [OPERATOR, OPERATOR, None]


def test_without_somebody_waiting_a_limit_loads_nothing():
    assert whose(ready=1, limit=4) is None


def test_what_held_off_requests_do_not_get_an_operator_gets():
    assert whose(waiting=True, ready=1, limit=3, held_off=True) is None
    assert whose(waiting=True, asked=2, ready=1, limit=3, held_off=True) is OPERATOR


def test_what_is_to_come_is_waited_for_whatever_is_wanted():
    for waiting, asked, ready, to_come in product((False, True), range(4), range(3), (1, 2)):
        assert whose(waiting=waiting, asked=asked, ready=ready, to_come=to_come, limit=9) is None


@pytest.mark.parametrize(("failures", "asked_s", "expected_s"), [(1, None, 1), (2, None, 2), (4, 1.0, 8), (1, 30.0, 6)])
def test_the_pause_after_failures_doubles_and_is_at_least_what_the_failure_asked_for(failures, asked_s, expected_s):
    assert extra_retry_s(failures, asked_s) == expected_s * EXTRA_RETRY_FIRST_S


@pytest.mark.parametrize("failures", [6, 100, 10**6])
def test_the_pause_is_bounded(failures):
    assert extra_retry_s(failures, 1e9) == EXTRA_RETRY_MOST_S
