"""How predictions are judged."""

import pytest
from msgspec.structs import replace

from tests.bench.predicted import Plan, as_page, as_table, error, scaled_ms, summary, verdict


def plan(predicted: float, measured: float, observed: float | None = None, model: str = "small-F16") -> Plan:
    return Plan(
        model=model,
        read_bytes=40 << 20,
        threads=1,
        backends=0,
        layers="own 0-7 + output",
        predicted_ms=predicted,
        observed_ms=observed or measured,
        runs_ms=(measured * 3, measured, measured * 0.9),
    )


def test_what_was_measured_is_the_median_of_the_runs_and_errors_are_of_tokens_per_second():
    one = plan(predicted=10.0, measured=20.0)
    assert one.measured_ms == 20.0
    assert error(10.0, one) == pytest.approx(1.0)  # 100 predicted, 50 measured
    assert error(25.0, one) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("other", "pairs", "right"),
    [
        (plan(12.0, 12.0), 1, 1),
        (plan(9.0, 12.0), 1, 0),
        (plan(9.0, 11.4), 0, 0),  # not more than 15 % apart
        (plan(9.0, 8.0), 1, 1),
        (plan(9.0, 12.0, model="small-Q4_0"), 0, 0),
    ],
)
def test_pairs_of_one_kind_of_weights_that_differ_enough_are_in_the_right_order_or_not(other, pairs, right):
    found = verdict([plan(10.0, 10.0), other])
    assert (found.pairs, found.right) == (pairs, right)


def test_it_holds_with_nine_of_ten_pairs_and_small_errors_after_one_observation():
    right = [plan(ms, ms) for ms in (10.0, 20.0, 40.0, 80.0)]
    swapped = [*right, plan(42.0, 160.0)]  # predicted to be faster than 80, and nothing else is wrong
    assert verdict(swapped).right == 9
    assert verdict(swapped).holds
    assert not verdict([*right, plan(39.0, 160.0)]).holds  # two of ten
    assert verdict([plan(10.0, 10.0, observed=11.4)]).holds
    assert not verdict([plan(10.0, 10.0, observed=8.6)]).holds
    assert verdict([plan(10.0, 10.0, observed=8.6)]).worst_error == pytest.approx(1 / 0.86 - 1)


def test_a_plan_that_did_not_run_is_scaled_by_the_others_of_its_model():
    plans = [plan(10.0, 20.0), plan(10.0, 40.0), plan(10.0, 60.0), plan(10.0, 10.0, model="large-F16")]
    assert scaled_ms(plans[0], plans) == pytest.approx(50.0)
    assert scaled_ms(plans[3], plans) == 10.0


def test_the_page_has_every_plan_and_what_is_asked():
    plans = [plan(10.0, 20.0), replace(plan(40.0, 40.0), threads=2, backends=3), plan(5.0, 20.0, model="small-Q4_0")]
    page = as_page(plans)
    assert "| small-F16, 40 MiB | 1 | none | own 0-7 + output | 100.0 | 50.0 | +100 % | 50.0 | +0 % |" in page
    assert "| small-F16, 40 MiB | 2 | 3 | own 0-7 + output | 25.0 | 25.0 | +0 % | 25.0 | +0 % |" in page
    assert "3 plans, 1 pairs that differ by more than 15 %: 1 in the right order (asked: 90 %)." in page
    for line in summary(plans):
        assert line in page
        assert line in as_table(plans)
    assert "Median error of Q4_0 plans: 300 % as predicted" in page
