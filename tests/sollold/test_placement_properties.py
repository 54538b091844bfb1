"""What holds for every cluster."""

from hypothesis import given, settings
from hypothesis import strategies as st
from sollol.report import PlacementWish

from sollold.placement import PlacementDefaults, decide
from sollold.placement.explain import as_json, explain
from sollold.placement.filters import filters_for, find_model, usual
from sollold.placement.job import job_for
from tests.cpu import cost
from tests.placement_cases import GIB, MODEL, cpu, gpu, model, node

MODELS = (model(), model("other"))
DEVICES = st.builds(
    lambda free, bandwidth, gpus: (cpu(free, bandwidth), *gpus),
    st.integers(0, 20 * GIB),
    st.sampled_from((0.0, 19.7e9, 20e9, 40e9)),
    st.lists(
        st.builds(
            gpu,
            st.just("?"),
            st.integers(0, 12 * GIB),
            st.sampled_from((0.0, 5e9, 100e9, 500e9)),
            unified=st.booleans(),
            usable=st.booleans(),
        ),
        max_size=3,
    ),
).map(lambda devices: (devices[0], *(named(device, f"GPU{at}") for at, device in enumerate(devices[1:]))))


def named(device, device_id):
    return type(device)(**{name: getattr(device, name) for name in device.__struct_fields__} | {"device_id": device_id})


@st.composite
def clusters(draw):
    return [
        node(
            f"n{at}",
            *draw(DEVICES),
            age_s=draw(st.sampled_from((0.1, 0.1, 30.0))),
            models=draw(st.sampled_from(((MODELS[0],), MODELS, ()))),
            engine=draw(st.sampled_from((True, True, False))),
            labels=draw(st.sampled_from(({}, {"ssd": "yes"}))),
        )
        for at in range(draw(st.integers(0, 6)))
    ]


WISHES = st.builds(
    PlacementWish,
    model=st.sampled_from((MODEL, "other", "none")),
    policy=st.sampled_from(("fit", "classic")),
    strategy=st.sampled_from(("pack", "spread")),
    prefer=st.sampled_from(((), ("ssd",))),
    parallel=st.integers(1, 8),
    context_per_slot=st.integers(1, 16384),
)


CONSTRAINED = st.builds(
    PlacementWish,
    model=st.sampled_from((MODEL, "none")),
    require=st.sampled_from(((), ("ssd",))),
    min_cpus=st.sampled_from((None, 1, 16)),
    min_memory_bytes=st.sampled_from((None, GIB, 999 * GIB)),
    pinned_node=st.sampled_from((None, "n0")),
    local=st.booleans(),
)


@given(clusters(), WISHES, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_the_order_of_the_nodes_and_asking_twice_change_nothing(nodes, wish, random):
    first = decide(wish, nodes, PlacementDefaults())
    random.shuffle(nodes)

    assert first == decide(wish, nodes, PlacementDefaults())


@given(clusters(), WISHES)
@settings(max_examples=80, deadline=None)
def test_every_node_is_explained_and_every_score_is_the_sum_of_its_parts(nodes, wish):
    decision = decide(wish, nodes, PlacementDefaults())

    assert [each.report.node_id for each in nodes] == [verdict.node_id for verdict in decision.nodes]
    assert (decision.refusal is None) == bool(decision.coordinator) == (sum(v.best for v in decision.nodes) == 1)
    for verdict in decision.nodes:
        assert verdict.score is not None or verdict.refusal is not None
        if verdict.score is not None:
            assert verdict.score == sum(part.value for part in verdict.parts)
        assert verdict.node_id in explain(decision)
    assert len(nodes) == len(as_json(decision)["nodes"])


@given(clusters(), WISHES)
@settings(max_examples=150, deadline=None)
def test_a_fit_plan_never_takes_more_than_is_free_and_places_every_layer(nodes, wish):
    decision = decide(wish, nodes, PlacementDefaults())
    if wish.policy != "fit" or decision.plan is None:
        return
    (chosen,) = (each.report for each in nodes if each.report.node_id == decision.coordinator)
    devices = {device.device_id: device for device in chosen.devices}
    on_host = 0
    for share in decision.plan.shares:
        assert share.total_bytes <= devices[share.device_id].free_bytes
        on_host += share.total_bytes if share.device_id == "CPU" or devices[share.device_id].unified else 0
    assert on_host <= devices["CPU"].free_bytes
    assert MODELS[0].shape.layers + 1 == sum(share.layers for share in decision.plan.shares)


@given(clusters(), CONSTRAINED)
@settings(max_examples=80, deadline=None)
def test_no_filter_refuses_a_node_that_is_taken_for_usual(nodes, wish):
    job = job_for(wish, PlacementDefaults())
    for each in nodes:
        found = find_model(each.report, job.model)
        if usual(job, each, found):
            assert all(check(job, each, found) is None for check in filters_for(job, files_known=True))


@given(clusters())
@settings(max_examples=80, deadline=None)
def test_the_largest_possible_fit_is_less_than_the_whole(nodes):
    for verdict in decide(PlacementWish(model=MODEL), nodes, PlacementDefaults()).nodes:
        if verdict.refusal is not None and "largest_layers" in verdict.refusal.numbers:
            assert 0 <= verdict.refusal.numbers["largest_layers"] < verdict.refusal.numbers["all_layers"]


def test_a_thousand_nodes_are_decided_without_a_noticeable_pause():
    """The budget of 2 ms is watched by tests/bench; here only that nothing is quadratic or worse."""
    nodes = [node(f"n{at}", cpu(free=64 * GIB, bandwidth=20e9 + at), gpu(free=at * GIB // 50)) for at in range(1000)]
    decide(PlacementWish(model=MODEL), nodes, PlacementDefaults())
    with cost() as one:
        decide(PlacementWish(model=MODEL), nodes, PlacementDefaults())

    assert one.cpu_s < 0.25
