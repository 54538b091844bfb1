"""A wish wins over its model's options, these over those of all models, these over the head's settings."""

import pytest
from msgspec.structs import fields
from sollol.report import PlacementWish

from sollold.catalogue import Catalogue
from sollold.options import ModelOptions, Options
from sollold.placement import PlacementDefaults
from sollold.placement.job import job_for
from tests.placement_cases import MODEL, model, node

TABLES = {
    "default": ModelOptions(pools=2, parallel=8, require=("ssd",), allow_reduced_context=True, min_cpus=4),
    MODEL: ModelOptions(parallel=2, strategy="spread", require=("gpu_node",), pinned_node="big"),
    "other": ModelOptions(pools=5, max_nodes=1, backends_per_pool=0),
}


def options(tables=TABLES, known=lambda _: None):
    return Options(tables, known=known)


def test_what_a_wish_leaves_open_is_as_its_models_options_say_and_then_as_those_of_all():
    assert options().complete(PlacementWish(model=MODEL)) == PlacementWish(
        model=MODEL,
        parallel=2,
        strategy="spread",
        require=("gpu_node",),
        pinned_node="big",
        allow_reduced_context=True,
        min_cpus=4,
    )


def test_a_wish_wins_over_every_option():
    wish = PlacementWish(
        model=MODEL,
        policy="classic",
        context_per_slot=1,
        parallel=1,
        kv_type="q8_0",
        require=("rack=a",),
        prefer=("x",),
        min_cpus=0,
        min_memory_bytes=0,
        pinned_node="",
        strategy="pack",
        max_nodes=2,
        backends_per_pool=1,
        allow_reduced_context=False,
    )

    assert options().complete(wish) == wish


def test_what_no_option_says_is_as_the_heads_settings_say():
    defaults = PlacementDefaults(kv_type="q8_0", parallel=3)
    job = job_for(options().complete(PlacementWish(model=MODEL)), defaults)

    assert (job.kv_type, job.parallel, job.strategy) == ("q8_0", 2, "spread")


@pytest.mark.parametrize(("name", "pools"), [(MODEL, 2), ("other", 5), ("third", 2)])
def test_the_number_of_pools_is_the_models_own_else_that_of_all(name, pools):
    assert options().pools(name) == pools


def test_without_options_there_is_one_pool_and_a_wish_stays_as_it_is():
    nothing = options({})

    assert nothing.pools(MODEL) == 1
    assert nothing.complete(PlacementWish(model=MODEL)) == PlacementWish(model=MODEL)


def test_a_models_options_may_stand_under_an_alias_of_it():
    class Nodes:
        models_version = 1

        def statuses(self):
            return (node("a", models=(model(aliases=("short", "other")),)),)

    catalogue = Catalogue(Nodes(), stale_after_s=8.0)
    found = options({"short": ModelOptions(pools=3), "none": ModelOptions(pools=4)}, known=catalogue.known)

    assert found.pools(MODEL) == 3
    assert found.pools("none") == 4, "no node has it yet: its name will do"
    assert found.pools("third") == 1


def test_every_option_but_pools_is_a_part_of_a_wish():
    wishes = {info.name for info in fields(PlacementWish)}

    assert {info.name for info in fields(ModelOptions)} - wishes == {"pools"}
