"""What was observed, model by model and plan by plan, a bounded number of them. Pure."""

from statistics import median

from msgspec import Struct
from msgspec.structs import replace
from sollol.speed import PlanKey, SpeedObservation

from agent.speed_meter import Sample

MOST_RECORDS = 32
MOST_SAMPLES = 5


class Record(Struct, frozen=True, kw_only=True):
    """Of one model on one plan: the newest samples in ms per token, the oldest first."""

    identity: str
    key: PlanKey
    samples: tuple[float, ...]
    tokens: int
    predicted_ms_per_token: float

    @property
    def ms_per_token(self) -> float:
        """The median: one sample taken while the machine was busy with something else does not count for much."""
        return median(self.samples)


class Records:
    """The newest first; when there are too many, those are forgotten that were not observed for the longest time."""

    def __init__(self, records: tuple[Record, ...] = ()) -> None:
        self._records = {(record.identity, record.key): record for record in reversed(records[:MOST_RECORDS])}

    def add(self, identity: str, key: PlanKey, sample: Sample, predicted_ms_per_token: float) -> None:
        known = self._records.pop((identity, key), None)
        if known is None:
            known = Record(identity=identity, key=key, samples=(), tokens=0, predicted_ms_per_token=0.0)
        self._records[identity, key] = replace(
            known,
            samples=(*known.samples, sample.ms_per_token)[-MOST_SAMPLES:],
            tokens=known.tokens + sample.tokens,
            predicted_ms_per_token=predicted_ms_per_token,
        )
        while len(self._records) > MOST_RECORDS:
            del self._records[next(iter(self._records))]

    def all(self) -> tuple[Record, ...]:
        return tuple(reversed(self._records.values()))

    def ms_per_token(self, identity: str, key: PlanKey) -> float:
        """0 when it was never observed."""
        record = self._records.get((identity, key))
        return record.ms_per_token if record is not None else 0.0

    def observations(self) -> tuple[SpeedObservation, ...]:
        return tuple(
            SpeedObservation(
                identity=record.identity,
                devices=record.key.devices,
                layers=record.key.layers,
                kv_type=record.key.kv_type,
                ms_per_token=record.ms_per_token,
                tokens=record.tokens,
                predicted_ms_per_token=record.predicted_ms_per_token,
            )
            for record in self.all()
        )
