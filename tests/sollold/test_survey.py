"""Which link is due: pure, so every case is a list of reports."""

import random

import pytest
from msgspec.structs import replace
from sollol.link import Link
from sollol.report import DeviceShare, Instance, InstanceKind, InstanceState, Reservation

from sollold import survey
from sollold.survey import MEASURED_FOR_S, due
from tests.cpu import cost
from tests.placement_cases import cpu, model, node
from tests.random_clusters import OTHERS, RPC, with_rpc


def able(node_id, *links, host="10.0.0.1", engine=RPC, boot_id="boot", **more):
    return with_rpc(node(node_id, host=host, **more), engine, links=links, boot_id=boot_id)


def to(node_id, *, age_s=0.0, boot_id="boot", unreachable=False, address="10.0.0.1:7462"):
    if unreachable:
        return Link(node_id=node_id, unreachable=True, age_s=age_s, address=address)
    return Link(node_id=node_id, rtt_s=0.001, bytes_per_s=1e8, age_s=age_s, boot_id=boot_id, address=address)


def pair(*statuses, **more):
    found = due(statuses, **more)
    return found and found.pair


def all_pairs(statuses):
    """Every pair that is asked for, in turn, when each is measured as soon as it is."""
    asked = []
    while found := due(statuses):
        asked.append(found.pair)
        at = next(at for at, each in enumerate(statuses) if each.report.node_id == found.node_id)
        report = statuses[at].report
        links = (*(each for each in report.links if each.node_id != found.peer_id), to(found.peer_id))
        statuses[at] = replace(statuses[at], report=replace(report, links=links))
        assert len(asked) <= len(statuses) ** 2
    return asked


def test_a_link_that_nobody_measured_is_due_with_the_address_of_the_other_node():
    found = due([able("a"), able("b", host="10.0.0.2")])

    assert (found.node_id, found.peer_id, found.host, found.port) == ("a", "b", "10.0.0.2", 7462)


def test_every_pair_is_measured_each_way_and_first_all_in_one_direction():
    asked = all_pairs([able("a"), able("b"), able("c")])

    assert asked[:3] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert sorted(asked) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]


def test_the_order_of_the_nodes_does_not_matter():
    nodes = [able(name, to("d", age_s=age)) for name, age in (("a", 700), ("b", 900), ("c", 650), ("d", 0))]
    expected = due(nodes)
    for seed in range(20):
        random.Random(seed).shuffle(nodes)
        assert due(nodes) == expected


def test_fresh_links_are_not_due_and_the_oldest_of_old_ones_is():
    fresh = MEASURED_FOR_S - 10
    a, b = able("a", to("b", age_s=fresh)), able("b", to("a", age_s=fresh))
    assert pair(a, b) is None
    assert pair(able("a", to("b", age_s=MEASURED_FOR_S + 1)), b) == ("a", "b")
    assert pair(able("a", to("b", age_s=MEASURED_FOR_S + 1)), able("b", to("a", age_s=MEASURED_FOR_S + 2))) == (
        "b",
        "a",
    )


def test_a_link_ages_with_the_report_that_has_it():
    a, b = able("a", to("b", age_s=MEASURED_FOR_S - 10)), able("b", to("a"))
    assert pair(replace(a, report_age_s=20.0), b) == ("a", "b")


def test_after_a_boot_of_the_other_node_it_is_due_again():
    a, b = able("a", to("b", boot_id="before")), able("b", to("a"), boot_id="after")
    assert pair(a, b) == ("a", "b")


def test_a_node_out_of_reach_is_its_peers_business_to_try_again_and_measured_from_its_own_side():
    tried = able("a", to("b", unreachable=True, age_s=MEASURED_FOR_S + 1))
    assert pair(tried, able("b")) == ("b", "a")
    assert pair(tried, able("b", to("a"))) is None


def test_a_node_that_moved_is_measured_where_it_is_now():
    there = able("b", to("a"), host="10.0.0.2")
    assert pair(able("a", to("b", address="10.0.0.2:7462")), there) is None
    assert pair(able("a", to("b", address="10.9.0.2:7462")), there) == ("a", "b")
    assert pair(able("a", to("b", unreachable=True, address="10.9.0.2:7462")), there) == ("a", "b")


@pytest.mark.parametrize(
    "other",
    [
        able("b", engine=None),
        *(able("b", engine=engine) for engine in OTHERS),
        able("b", cordoned=True),
        replace(able("b"), connected=False),
    ],
)
def test_a_node_that_can_neither_coordinate_nor_lend_is_left_alone(other):
    assert pair(able("a"), other) is None


def test_two_nodes_without_any_file_never_work_together():
    bare = {"models": ()}
    assert pair(able("a", **bare), able("b", **bare)) is None
    assert pair(able("a", **bare), able("b", models=(model(),))) == ("a", "b")


def instance(**more):
    return Instance(**{"instance_id": "p", "model": "m", "state": InstanceState.READY} | more)


LENT = DeviceShare(device_id="CPU", layers=4, node_id="b")
WORKING = {
    "generates": able("a", instances=(instance(active_streams=1),)),
    "loads": able("a", instances=(instance(state=InstanceState.STARTING),)),
    "starts a backend": able("a", instances=(instance(state=InstanceState.STARTING, kind=InstanceKind.BACKEND),)),
}


@pytest.mark.parametrize("a", WORKING.values(), ids=WORKING)
def test_a_node_that_works_is_not_disturbed_and_others_are_measured_meanwhile(a):
    assert pair(a, able("b")) is None
    assert pair(a, able("b"), able("c")) == ("b", "c")


def test_a_node_that_lends_to_one_that_generates_is_not_disturbed_either():
    a = able("a", instances=(instance(active_streams=1, shares=(LENT,)),))
    assert pair(a, able("b"), able("c")) is None
    idle = able("a", instances=(instance(shares=(LENT,)),))
    assert pair(idle, able("b"), able("c")) == ("a", "b")


def test_a_node_that_has_just_promised_bytes_is_about_to_load():
    promised = Reservation(pool_id="p", bytes={"CPU": 1}, expires_in_s=20.0)
    a = able("a")
    assert pair(replace(a, report=replace(a.report, reservations=(promised,))), able("b")) is None
    bound = replace(promised, expires_in_s=None)
    assert pair(replace(a, report=replace(a.report, reservations=(bound,))), able("b")) == ("a", "b")


def test_pairs_that_failed_a_moment_ago_are_left_out():
    assert pair(able("a"), able("b"), besides={("a", "b")}) == ("b", "a")
    assert pair(able("a"), able("b"), besides={("a", "b"), ("b", "a")}) is None


def many():
    return [with_rpc(node(f"n{at:04d}", cpu(bandwidth=(1 + at % 100) * 1e9)), boot_id="boot") for at in range(1000)]


def test_of_very_many_nodes_the_fastest_are_measured(monkeypatch):
    monkeypatch.setattr(survey, "MOST_NODES", 12)
    asked = all_pairs(many())

    assert len(asked) == 12 * 11
    fastest = {f"n{at:04d}" for at in range(99, 1000, 100)}
    assert {name for names in asked for name in names} == fastest | {"n0098", "n0198"}


def test_deciding_among_very_many_nodes_is_cheap():
    nodes = many()
    with cost() as looks:
        for _ in range(10):
            assert due(nodes)

    assert looks.cpu_s < 0.2
