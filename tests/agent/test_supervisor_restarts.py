from hypothesis import given
from hypothesis import strategies as st

from agent.supervisor.restarts import History, RestartPolicy, after_death, retry_after_s

POLICY = RestartPolicy()


def deaths_at(*times: float) -> History:
    history = History()
    for time in times:
        history = after_death(history, POLICY, now_s=time)
    return history


def test_a_model_that_never_died_goes_on() -> None:
    assert retry_after_s(History(), now_s=0) == 0


def test_two_deaths_in_a_minute_go_on() -> None:
    assert retry_after_s(deaths_at(0, 1), now_s=1) == 0


def test_the_third_death_in_a_minute_waits_five_seconds() -> None:
    history = deaths_at(0, 10, 59)
    assert retry_after_s(history, now_s=59) == 5
    assert retry_after_s(history, now_s=62) == 2
    assert retry_after_s(history, now_s=64) == 0


def test_three_deaths_spread_over_more_than_a_minute_go_on() -> None:
    assert retry_after_s(deaths_at(0, 35, 70), now_s=70) == 0


def test_each_further_death_doubles_the_wait_up_to_a_minute() -> None:
    history, now, waits = deaths_at(0, 0), 0.0, []
    for _ in range(7):
        history = after_death(history, POLICY, now_s=now)
        waits.append(retry_after_s(history, now_s=now))
        now += waits[-1] + 1
    assert waits == [5, 10, 20, 40, 60, 60, 60]


def test_a_quiet_time_forgives() -> None:
    assert retry_after_s(after_death(deaths_at(0, 1, 2), POLICY, now_s=200), now_s=200) == 0


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_the_history_and_the_wait_stay_bounded(gaps: list[float]) -> None:
    history, now = History(), 0.0
    for gap in gaps:
        now += gap
        history = after_death(history, POLICY, now_s=now)
        assert len(history.deaths) <= POLICY.deaths
        assert 0 <= retry_after_s(history, now_s=now) <= POLICY.longest_wait_s
