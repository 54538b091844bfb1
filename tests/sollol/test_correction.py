"""Corrections of the memory model: what they do to its figures, and how layouts are named."""

import pytest
from msgspec.structs import replace
from sollol.correction import UNCORRECTED, Correction, layout_of, scaled
from sollol.memory import CPU_MARGIN_BYTES, device_shares
from sollol.report import DeviceKind

from tests.placement_cases import shape

CPU, GPU = DeviceKind.CPU, DeviceKind.GPU
SHAPE = shape()
SPLIT = [("CPU", CPU, 0), ("CUDA0", GPU, 4), ("CPU", CPU, 5)]


def shares(correction=UNCORRECTED, split=SPLIT, of=SHAPE):
    load = {"context_per_slot": 4096, "parallel": 2, "kv_type": "f16", "ubatch": 512}
    return device_shares(of, split, correction=correction, **load)


def test_a_layout_is_named_by_kinds_and_layers_in_order_whoever_owns_the_devices():
    assert layout_of([("CPU", 0), ("CUDA1", 12), ("CPU", 21)]) == "CPU:0 GPU:12 CPU:21"


@pytest.mark.parametrize("factor", [1.0, 1.1, 0.7, 1 + 2**-40])
def test_scaling_loses_no_byte(factor):
    for size in (0, 1, 3, 10**12 + 7):
        assert scaled(size, factor) >= size * factor
        assert scaled(size, factor) - size * factor < 1.001


def test_each_kind_is_multiplied_on_every_device_and_the_addition_is_part_of_its_margin():
    correction = Correction(weights=1.5, kv=2.0, compute=1.25, added_bytes=1000)

    for plain, corrected in zip(shares(), shares(correction), strict=True):
        assert corrected.weight_bytes == scaled(plain.weight_bytes, 1.5)
        assert corrected.kv_bytes == 2 * plain.kv_bytes
        assert corrected.compute_bytes == scaled(plain.compute_bytes, 1.25)
        parts = (corrected.weight_bytes, corrected.kv_bytes, corrected.compute_bytes, corrected.margin_bytes)
        assert corrected.total_bytes == sum(parts)
    host, gpu, _ = shares(correction)
    assert host.margin_bytes == CPU_MARGIN_BYTES + 1000
    assert gpu.margin_bytes == shares()[1].margin_bytes + 1000


def test_a_backend_keeps_room_for_a_tensor_on_its_way_at_its_corrected_size():
    of = replace(SHAPE, output_bytes=8 * SHAPE.output_bytes)
    *_, plain = shares(of=of)
    *_, corrected = shares(Correction(weights=2.0), of=of)

    assert plain.margin_bytes > CPU_MARGIN_BYTES
    assert corrected.margin_bytes - plain.margin_bytes == of.output_bytes


def test_a_device_without_layers_needs_nothing_of_it():
    split = [("CPU", CPU, 9), ("CUDA0", GPU, 0)]

    assert shares(Correction(added_bytes=5), split)[1].total_bytes == 0
