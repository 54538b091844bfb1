import pytest
from msgspec.structs import replace
from sollol.report import DeviceShare, InstanceKind, InstanceState, NodeStatus, Pool

from sollold.gauges import Facts, gauges
from tests.fakes.fake_metrics import NOTHING, samples
from tests.placement_cases import GIB, cpu, node
from tests.pool_cluster import instance

M = "tiny:8b"


def facts(*nodes, models=(), **more):
    pools = tuple(
        Pool(node_id=each.report.node_id, instance=running)
        for each in nodes
        for running in each.report.instances
        if running.kind is InstanceKind.COORDINATOR
    )
    return replace(NOTHING, nodes=nodes, pools=pools, models=models, **more)


def said(known: Facts, name):
    """What a metric says, above 0, by its labels."""
    found = samples(family for family in gauges(known) if family.name == name)
    return {key.removeprefix(name): value for key, value in found.items() if value}


def test_a_node_says_whether_it_is_there_what_it_may_do_and_what_it_has():
    device = replace(cpu(free=3 * GIB, total=8 * GIB), reserved_bytes=GIB)
    known = facts(node("a", device, cordoned=True, draining=True))
    assert said(known, "sollol_node_up") == {"{node=a}": 1}
    assert said(known, "sollol_node_cordoned") == {"{node=a}": 1}
    assert said(known, "sollol_node_draining") == {"{node=a}": 1}
    for name, size in (("total", 8 * GIB), ("free", 3 * GIB), ("reserved", GIB)):
        assert said(known, f"sollol_device_{name}_bytes") == {"{device=CPU,kind=CPU,node=a}": size}


def test_the_certificate_of_a_node_out_of_reach_goes_on_running_out():
    report = replace(node("a").report, certificate_expires_in_s=100.0)
    lost = NodeStatus(report=report, report_age_s=130.0, connected=False)
    known = facts(lost, node("b"), certificates_expire_in_s={"grpc": 60.0, "https": -1.0})
    assert said(known, "sollol_node_up") == {"{node=b}": 1}
    assert said(known, "sollol_node_report_age_seconds")["{node=a}"] == 130
    assert said(known, "sollol_node_certificate_expires_in_seconds") == {"{node=a}": -30}
    assert said(known, "sollol_certificate_expires_in_seconds") == {"{use=grpc}": 60, "{use=https}": -1}


def test_instances_are_counted_by_kind_and_state_and_a_state_without_any_is_0():
    running = (instance("p0"), instance("p1"), instance("b0", kind=InstanceKind.BACKEND, state=InstanceState.FAILED))
    known = facts(node("a", instances=running))
    assert said(known, "sollol_instances") == {
        "{kind=COORDINATOR,node=a,state=READY}": 2,
        "{kind=BACKEND,node=a,state=FAILED}": 1,
    }
    every = samples(family for family in gauges(known) if family.name == "sollol_instances")
    assert len(every) == len(InstanceKind) * len(InstanceState)


def test_pools_are_counted_by_model_and_those_of_nodes_out_of_reach_are_not():
    lost = replace(node("c", instances=(instance("p3"),)), connected=False)
    starting = instance("p1", state=InstanceState.STARTING)
    known = facts(node("a", instances=(instance("p0"), starting)), lost, models=("cold",))
    assert said(known, "sollol_pools") == {"{model=tiny:8b,state=ready}": 1, "{model=tiny:8b,state=loading}": 1}
    every = samples(family for family in gauges(known) if family.name == "sollol_pools")
    assert every["sollol_pools{model=cold,state=ready}"] == 0
    assert list(said(known, "sollol_pool_slots")) == ["{model=tiny:8b,node=a,pool=0}"]


def test_a_ready_pool_says_its_slots_streams_speed_and_how_wrong_its_memory_was():
    shares = (
        DeviceShare(device_id="CPU", layers=0),
        DeviceShare(device_id="CUDA0", layers=4, total_bytes=130, margin_bytes=20, logged_bytes=100),
        DeviceShare(device_id="CPU", layers=5, total_bytes=90, logged_bytes=100, node_id="b"),
    )
    more = {"pool_number": 1, "predicted_ms_per_token": 40.0, "observed_ms_per_token": 50.0}
    pool = instance("p0", active_streams=1, shares=shares, **more)
    known = facts(node("a", instances=(pool,)))
    of = "model=tiny:8b,node=a,pool=1"
    assert said(known, "sollol_pool_slots") == {f"{{{of}}}": 2}
    assert said(known, "sollol_pool_active_streams") == {f"{{{of}}}": 1}
    assert said(known, "sollol_pool_predicted_seconds_per_token") == {f"{{{of}}}": 0.04}
    assert said(known, "sollol_pool_observed_seconds_per_token") == {f"{{{of}}}": 0.05}
    assert said(known, "sollol_pool_memory_error_ratio") == {
        f"{{device=CUDA0,device_node=a,{of}}}": pytest.approx(0.1),
        f"{{device=CPU,device_node=b,{of}}}": pytest.approx(-0.1),
    }


def test_two_pools_with_one_number_are_one_series():
    known = facts(node("a", instances=(instance("p0"), instance("p1"))))
    (family,) = [family for family in gauges(known) if family.name == "sollol_pool_slots"]
    assert len(family.samples) == 1
