from sollol.report import BackendEndpoint, DeviceShare

from agent.supervisor.allowance import MIB, limit_bytes, received_bytes, sent_bytes
from tests.supervised import plan_of, wish_of

GIB = 1024 * MIB


def test_an_engine_may_take_a_quarter_and_512_mib_more_than_was_reserved():
    assert limit_bytes({"CPU": 8 * GIB}) == 10 * GIB + 512 * MIB


def test_a_small_model_still_has_room_for_the_program_itself():
    assert limit_bytes({"CPU": 1}) == 1 + 512 * MIB


def test_the_driver_of_a_gpu_has_a_gib_and_what_is_on_the_gpu_does_not_count():
    assert limit_bytes({"CPU": 4 * GIB, "CUDA0": 80 * GIB, "CUDA1": GIB}) == 5 * GIB + 512 * MIB + GIB
    assert limit_bytes({"CUDA0": 80 * GIB}) == 512 * MIB + GIB


def test_a_gpu_without_memory_of_its_own_counts_as_the_cpu_does():
    assert limit_bytes({"CPU": GIB, "ROCm0": 7 * GIB}, unified={"ROCm0"}) == 10 * GIB + 512 * MIB + GIB


def test_what_was_promised_nothing_has_no_limit():
    assert limit_bytes({}) is None


def test_a_tensor_that_passes_over_rpc_lies_there_twice():
    assert limit_bytes({"CPU": 4 * GIB}, 3 * GIB) == 5 * GIB + 512 * MIB + 3 * GIB
    assert received_bytes(wish_of("p", bytes={"CPU": 2 * GIB, "CUDA0": 3 * GIB})) == 3 * GIB


def test_only_a_coordinator_with_backends_sends_tensors():
    plan = plan_of("m")
    shares = tuple(DeviceShare(device_id="CPU", layers=5, total_bytes=size) for size in (GIB, 7 * GIB))
    alone = type(plan)(model="m", parallel=1, context_per_slot=1, shares=shares)
    lender = BackendEndpoint(node_id="b", host="127.0.0.1", port=1, device_ids=("CPU",))
    split = type(plan)(model="m", parallel=1, context_per_slot=1, shares=shares, backends=(lender,))

    assert (sent_bytes(alone), sent_bytes(split)) == (0, 7 * GIB)
