"""What is remembered of observed speeds."""

import msgspec
import pytest
from sollol.speed import PlanKey, SpeedObservation

from agent.speed_meter import Sample
from agent.speed_records import MOST_RECORDS, MOST_SAMPLES, Record, Records

ALONE = PlanKey(("CPU x2",), (9,), "f16")
SPLIT = PlanKey(("a/CPU x2", "b/CPU x1"), (5, 4), "f16")


def test_each_model_and_plan_has_its_own_speed_the_newest_first():
    records = Records()
    records.add("llama", ALONE, Sample(40, 20.0), 18.0)
    records.add("llama", SPLIT, Sample(50, 30.0), 22.0)
    records.add("qwen", ALONE, Sample(60, 5.0), 0.0)
    assert records.observations() == (
        SpeedObservation(
            identity="qwen", devices=ALONE.devices, layers=(9,), kv_type="f16", ms_per_token=5.0, tokens=60
        ),
        SpeedObservation(
            identity="llama",
            devices=SPLIT.devices,
            layers=(5, 4),
            kv_type="f16",
            ms_per_token=30.0,
            tokens=50,
            predicted_ms_per_token=22.0,
        ),
        SpeedObservation(
            identity="llama",
            devices=ALONE.devices,
            layers=(9,),
            kv_type="f16",
            ms_per_token=20.0,
            tokens=40,
            predicted_ms_per_token=18.0,
        ),
    )
    assert records.ms_per_token("llama", SPLIT) == 30.0
    assert records.ms_per_token("llama", PlanKey(("CPU x2",), (8,), "f16")) == 0.0


def test_one_bad_sample_hardly_counts_and_old_ones_are_forgotten():
    records = Records()
    for ms in (20.0, 90.0, 21.0):
        records.add("llama", ALONE, Sample(40, ms), 0.0)
    assert records.ms_per_token("llama", ALONE) == 21.0
    for _ in range(MOST_SAMPLES):
        records.add("llama", ALONE, Sample(40, 10.0), 0.0)
    assert records.ms_per_token("llama", ALONE) == 10.0
    assert records.observations()[0].tokens == 8 * 40


def test_the_newest_prediction_is_kept_beside_it():
    records = Records()
    records.add("llama", ALONE, Sample(40, 20.0), 15.0)
    records.add("llama", ALONE, Sample(40, 20.0), 16.0)
    assert records.observations()[0].predicted_ms_per_token == 16.0


def test_those_that_were_not_observed_for_longest_are_forgotten():
    records = Records()
    for number in range(MOST_RECORDS):
        records.add(str(number), ALONE, Sample(40, 20.0), 0.0)
    records.add("0", ALONE, Sample(40, 20.0), 0.0)
    records.add("another", ALONE, Sample(40, 20.0), 0.0)
    identities = [record.identity for record in records.all()]
    assert len(identities) == MOST_RECORDS
    assert identities[:2] == ["another", "0"]
    assert "1" not in identities


@pytest.mark.parametrize("count", [0, 3, MOST_RECORDS + 5])
def test_records_come_back_as_they_were_and_never_too_many(count: int):
    records = tuple(
        Record(identity=str(at), key=SPLIT, samples=(1.0, 2.0), tokens=3, predicted_ms_per_token=4.0)
        for at in range(count)
    )
    again = msgspec.json.decode(msgspec.json.encode(Records(records).all()), type=tuple[Record, ...])
    assert Records(again).all() == records[:MOST_RECORDS]
