"""What the head offers: models of live nodes merged by name, looked up at no cost per node."""

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, Retry, SollolError, refuse
from sollol.report import Instance, InstanceState

from sollold.catalogue import Catalogue
from tests.cpu import cost
from tests.placement_cases import model, node

BROKEN = refuse(Reason.MODEL_CORRUPT, "truncated").refusal


class View:
    def __init__(self, *statuses):
        self.nodes, self.models_version, self.asked = statuses, 0, 0
        self.complete = True

    def statuses(self):
        self.asked += 1
        return self.nodes

    def all_heard(self):
        return self.complete

    def any_live(self, stale_after_s):
        return any(status.connected or status.report_age_s <= stale_after_s for status in self.nodes)


def catalogue(*statuses):
    return Catalogue(View(*statuses), stale_after_s=8.0)


def lost(status, age_s):
    return replace(status, connected=False, report_age_s=age_s)


def test_copies_are_one_model_that_names_its_nodes_and_a_broken_one_counts_only_alone():
    a = node("a", models=(model("m", problem=BROKEN), model("bad", problem=BROKEN)))
    b, c = node("b", models=(model("m"),)), node("c", models=(model("m"), model("only-c", aliases=("x",))))

    models = {each.name: each for each in catalogue(a, b, c).models()}

    assert list(models) == ["bad", "m", "only-c"]
    assert models["m"].node_ids == ("b", "c")
    assert models["m"].problem is None
    assert models["m"].context_length == 8192
    assert models["bad"].problem == BROKEN
    assert models["only-c"].aliases == ("x",)


def test_only_live_nodes_offer_models_and_make_the_head_ready():
    silent = lost(node("a"), age_s=9.0)
    blip = lost(node("b", models=(model("m"),)), age_s=2.0)

    assert not catalogue(silent).ready()
    assert catalogue(silent).models() == ()
    assert catalogue(silent, blip).ready()
    assert [each.name for each in catalogue(silent, blip).models()] == ["m"]


def test_a_model_is_warm_where_a_connected_node_has_a_ready_pool():
    pool = Instance(instance_id="p", model="tiny:8b", state=InstanceState.READY)
    loading = replace(pool, state=InstanceState.STARTING)

    assert catalogue(node("a", instances=(pool,))).models()[0].warm
    assert not catalogue(node("a", instances=(loading,))).models()[0].warm
    assert not catalogue(lost(node("a", instances=(pool,)), age_s=1.0)).models()[0].warm


def test_a_name_wins_over_an_alias_and_aliases_lead_to_names():
    it = catalogue(node("a", models=(model("m", aliases=("x", "n")),)), node("b", models=(model("n"),)))

    assert it.canonical("m") == it.canonical("x") == "m"
    assert it.canonical("n") == "n"


def test_a_model_on_a_silent_node_is_known_so_that_placement_can_say_why_not():
    assert catalogue(lost(node("a"), age_s=30.0)).canonical("tiny:8b") == "tiny:8b"


@pytest.mark.parametrize(("name", "reason"), [("tiny:8c", Reason.MODEL_NOT_FOUND), ("../x", Reason.INVALID_MODEL_NAME)])
def test_unknown_and_impossible_names_are_refused(name, reason):
    with pytest.raises(SollolError) as caught:
        catalogue(node("a")).canonical(name)

    assert caught.value.refusal.reason is reason
    assert ("tiny:8b" in caught.value.refusal.message) == (reason is Reason.MODEL_NOT_FOUND)


def test_without_a_live_node_an_unknown_name_is_worth_asking_for_again():
    with pytest.raises(SollolError) as caught:
        catalogue().canonical("tiny:8b")

    assert caught.value.refusal.reason is Reason.NO_NODES
    assert caught.value.refusal.retry is Retry.RETRYABLE


def test_a_change_of_models_is_seen_at_once():
    view = View(node("a"))
    it = Catalogue(view, stale_after_s=8.0)
    assert it.canonical("tiny:8b")
    it.models()

    view.nodes, view.models_version = (node("a", models=(model("new"),)),), 1

    assert it.canonical("new") == "new"
    assert [each.name for each in it.models()] == ["new"]
    with pytest.raises(SollolError):
        it.canonical("tiny:8b")


def test_what_a_pool_serves_is_known_by_all_its_names_when_no_node_lists_its_file_any_more():
    pool = Instance(instance_id="p", model="tiny:8b", state=InstanceState.READY)
    view = View(node("a", models=(model(aliases=("tiny",)), model("other")), instances=(pool,)))
    it = Catalogue(view, stale_after_s=8.0)
    assert it.canonical("tiny") == "tiny:8b"

    view.nodes, view.models_version = (node("a", models=(), instances=(pool,)),), 1
    assert it.canonical("tiny") == it.canonical("tiny:8b") == "tiny:8b"
    assert it.sought("other") is None

    view.nodes, view.models_version = (node("a", models=()),), 2
    assert it.sought("tiny") is it.sought("tiny:8b") is None


def test_a_new_head_knows_a_model_by_the_pool_that_serves_it():
    pool = Instance(instance_id="p", model="tiny:8b", state=InstanceState.READY)

    assert catalogue(node("a", models=(), instances=(pool,))).canonical("tiny:8b") == "tiny:8b"


def test_while_a_node_has_not_been_heard_an_unknown_name_is_worth_asking_for_again():
    it = catalogue(node("a", models=()))
    it._nodes.complete = False

    for ask in (it.canonical, it.sought):
        with pytest.raises(SollolError) as caught:
            ask("tiny:8b")
        assert caught.value.refusal.reason is Reason.NO_NODES
        assert caught.value.refusal.retry is Retry.RETRYABLE
        assert caught.value.refusal.retry_after_s == 2.0
    it._nodes.complete = True
    assert it.sought("tiny:8b") is None


def test_a_lookup_costs_the_same_in_a_cluster_of_a_thousand_nodes():
    models = tuple(model(f"model-{number}", aliases=(f"alias-{number}",)) for number in range(20))
    view = View(*(node(f"n{number}", models=models) for number in range(1000)))
    it = Catalogue(view, stale_after_s=8.0)
    assert it.canonical("alias-19") == "model-19"
    it.models()

    with cost() as lookups:
        for _ in range(1000):
            it.canonical("alias-19")
    with cost() as listing:
        listed = it.models()

    assert lookups.cpu_s < 0.1, "1000 requests"
    assert listing.cpu_s < 0.05, "one list"
    assert len(listed[0].node_ids) == 1000
    assert view.asked == 3
