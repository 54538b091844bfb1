"""A part of the grid behind docs/memory-model.md, so that the page stays true: real loads, the page's own bounds."""

import statistics

import pytest

from tests.many_architectures import ARCHITECTURES, write_model
from tests.memory_grid import LOADS, lent_backends, points_of

MOST_BACKENDS = 3


@pytest.fixture(scope="module")
def addresses(engine_binary, ports):
    with lent_backends(engine_binary, ports, MOST_BACKENDS) as lent:
        yield lent


@pytest.mark.engine
@pytest.mark.parametrize("at", range(len(ARCHITECTURES)), ids=list(ARCHITECTURES))
def test_engines_log_what_was_predicted_for_every_split(at, engine_binary, addresses, tmp_path):
    """One load for each model, another one each time, in every other split; all are in the grid."""
    name = list(ARCHITECTURES)[at]
    model = tmp_path / "model.gguf"
    write_model(model, ARCHITECTURES[name])
    load, splits = LOADS[at % len(LOADS)], slice(at % 2, None, 2)
    points = list(points_of(engine_binary, addresses, name, model, [load], splits=splits))
    errors = [error for point in points for error in point.errors().values()]
    assert statistics.median(errors) <= 2
    assert max(errors) <= 8
    assert all(point.short_bytes <= point.margin for point in points)
