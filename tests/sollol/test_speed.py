"""What a plan's speed depends on."""

from sollol.report import DeviceShare
from sollol.speed import PlanKey, plan_key

THREADS = {"": 2, "a": 4, "b": 8}.__getitem__


def share(device_id: str, layers: int, node_id: str = "") -> DeviceShare:
    return DeviceShare(device_id=device_id, layers=layers, node_id=node_id)


def test_the_key_names_devices_layers_threads_of_cpus_and_the_kind_of_cache():
    shares = (share("CPU", 0), share("CPU", 5, "b"), share("CUDA0", 3, "a"), share("CUDA1", 1))
    assert plan_key(shares, "q8_0", THREADS) == PlanKey(("b/CPU x8", "a/CUDA0", "CUDA1"), (5, 3, 1), "q8_0")


def test_a_device_without_layers_does_not_count():
    alone = (share("CPU", 0), share("CUDA0", 9))
    assert plan_key(alone, "f16", THREADS) == PlanKey(("CUDA0",), (9,), "f16")
    assert plan_key(alone, "f16", {"": 1}.__getitem__) == plan_key(alone, "f16", THREADS)


def test_other_threads_layers_order_or_cache_are_other_plans():
    plan = (share("CPU", 5, "a"), share("CPU", 4, "b"))
    keys = {
        plan_key(plan, "f16", THREADS),
        plan_key(plan, "f16", {"a": 4, "b": 7}.__getitem__),
        plan_key(plan, "q4_0", THREADS),
        plan_key(plan[::-1], "f16", THREADS),
        plan_key((share("CPU", 6, "a"), share("CPU", 3, "b")), "f16", THREADS),
        plan_key((share("CPU", 5), share("CPU", 4, "b")), "f16", THREADS),
    }
    assert len(keys) == 6
