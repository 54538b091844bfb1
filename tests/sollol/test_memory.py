"""The formulas against sizes that the engine logged, and the properties that plans rely on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from sollol.errors import Reason, SollolError
from sollol.memory import (
    CPU_MARGIN_BYTES,
    GPU_MARGIN_BYTES,
    KV_TYPES,
    bytes_read_per_token,
    device_shares,
    kv_bytes,
)
from sollol.report import DeviceKind, ModelShape

MIB = 1024**2
CPU, GPU = DeviceKind.CPU, DeviceKind.GPU


def llama(embedding: int, heads: int, kv_heads: int, feed_forward: int, vocabulary: int = 768) -> ModelShape:
    """The shape of a dense llama model of 8 layers in f16."""
    kv = embedding // heads * kv_heads
    layer = 2 * (2 * embedding**2 + 2 * embedding * kv + 3 * embedding * feed_forward) + 2 * 4 * embedding
    return ModelShape(
        architecture="llama",
        layers=8,
        embedding_length=embedding,
        feed_forward_length=feed_forward,
        heads=heads,
        kv_heads=(kv_heads,) * 8,
        key_length=embedding // heads,
        value_length=embedding // heads,
        vocabulary=vocabulary,
        context_length=8192,
        layer_bytes=(layer,) * 8,
        embedding_bytes=2 * embedding * vocabulary,
        output_bytes=2 * embedding * vocabulary + 4 * embedding,
    )


MINI = llama(128, 4, 2, 256)
TINY = llama(256, 8, 4, 512)
MID = llama(1024, 16, 4, 2816)


def shares_of(shape, *split, context=8192, parallel=1, kv_type="f16", ubatch=512):
    return device_shares(shape, split, context_per_slot=context, parallel=parallel, kv_type=kv_type, ubatch=ubatch)


def alone(shape, **load):
    return shares_of(shape, ("CPU", CPU, shape.layers + 1), **load)[0]


@pytest.mark.parametrize(
    ("shape", "context", "parallel", "logged_mib"),
    [  # logged by llama-server: model, KV and compute buffer sizes
        (MINI, 8192, 1, (2.63, 16.00, 10.26)),
        (MINI, 2048, 2, (2.63, 8.00, 4.26)),
        (MINI, 8192, 2, (2.63, 32.00, 10.26)),
        (TINY, 2048, 1, (9.77, 8.00, 6.51)),
        (TINY, 2048, 4, (9.77, 32.00, 6.51)),
        (MID, 8192, 1, (175.07, 64.00, 32.51)),
    ],
)
def test_a_model_on_the_cpu_needs_what_the_engine_logs(shape, context, parallel, logged_mib):
    weights_mib, kv_mib, compute_mib = logged_mib
    share = alone(shape, context=context, parallel=parallel)
    answers = 4 * parallel * shape.vocabulary  # logged as "output buffer", 0.01 MiB
    assert share.weight_bytes / MIB == pytest.approx(weights_mib, abs=0.006)
    assert share.kv_bytes / MIB == kv_mib
    assert (share.compute_bytes - answers) / MIB == pytest.approx(compute_mib, abs=0.006)


@pytest.mark.parametrize(("shape", "context", "logged_mib"), [(TINY, 2048, 14.04), (MID, 8192, 62.54)])
def test_compute_buffers_grow_when_devices_overlap_batches(shape, context, logged_mib):
    _, first, second = shares_of(shape, ("CPU", CPU, 0), ("B0", CPU, 5), ("B1", CPU, 4), context=context)
    for share in (first, second):
        assert share.compute_bytes / MIB == pytest.approx(logged_mib, abs=0.006)


@pytest.mark.parametrize(
    ("kv_type", "per_element"), [("f32", 4), ("f16", 2), ("bf16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)]
)
def test_the_kv_cache_follows_its_type(kv_type, per_element):
    elements = 8192 * 8 * 2 * 32 * 2  # cells, layers, heads, head size, keys and values
    assert alone(MINI, kv_type=kv_type).kv_bytes == elements * per_element


def test_cells_are_rounded_up_to_256_per_slot():
    assert alone(MINI, context=1, parallel=3).kv_bytes == alone(MINI, context=256, parallel=3).kv_bytes
    assert alone(MINI, context=257).kv_bytes == 2 * alone(MINI, context=256).kv_bytes


def test_sliding_layers_keep_only_their_window_and_a_micro_batch():
    shape = replace(MINI, sliding_window=1024, sliding_layers=(True, False) * 4)
    load = {"context_per_slot": 8192, "parallel": 2, "kv_type": "f16", "ubatch": 512}
    assert kv_bytes(shape, 1, **load) == kv_bytes(MINI, 1, **load)
    assert kv_bytes(shape, 0, **load) == kv_bytes(MINI, 0, **{**load, "context_per_slot": 1536})
    short = {**load, "context_per_slot": 512}
    assert kv_bytes(shape, 0, **short) == kv_bytes(MINI, 0, **short)


def test_recurrent_layers_remember_the_same_at_any_context():
    shape = replace(MINI, kv_heads=(0,) * 8, recurrent_bytes=(1000,) * 8)
    assert alone(shape, context=512, parallel=3).kv_bytes == alone(shape, context=8192, parallel=3).kv_bytes == 24_000


def test_a_share_is_the_sum_of_its_parts():
    for share in shares_of(MID, ("CPU", CPU, 3), ("G0", GPU, 6)):
        parts = share.weight_bytes + share.kv_bytes + share.compute_bytes + share.margin_bytes
        assert share.total_bytes == parts


def test_the_cpu_holds_the_front_layers_and_the_last_gpu_the_output():
    cpu, first, last = shares_of(MID, ("CPU", CPU, 3), ("G0", GPU, 4), ("G1", GPU, 2))
    assert (cpu.first_layer, cpu.last_layer, cpu.layers) == (0, 2, 3)
    assert (first.first_layer, first.last_layer, first.layers) == (3, 6, 4)
    assert (last.first_layer, last.last_layer, last.layers) == (7, 7, 2)
    assert cpu.weight_bytes == 3 * MID.layer_bytes[0] + MID.embedding_bytes
    assert last.weight_bytes == MID.layer_bytes[0] + MID.output_bytes
    assert (cpu.margin_bytes, last.margin_bytes) == (CPU_MARGIN_BYTES, GPU_MARGIN_BYTES)


def test_the_cpu_keeps_embeddings_and_answers_when_gpus_hold_every_layer():
    cpu, gpu = shares_of(MINI, ("CPU", CPU, 0), ("G0", GPU, 9))
    assert (cpu.layers, cpu.first_layer, cpu.last_layer, cpu.kv_bytes) == (0, None, None, 0)
    assert cpu.weight_bytes == MINI.embedding_bytes
    assert cpu.compute_bytes > 4 * MINI.vocabulary
    assert gpu.layers == 9


def test_a_device_with_only_the_output_layer_has_no_repeating_layer():
    _, gpu = shares_of(MINI, ("CPU", CPU, 8), ("G0", GPU, 1))
    assert (gpu.layers, gpu.first_layer, gpu.kv_bytes) == (1, None, 0)
    assert gpu.weight_bytes == MINI.output_bytes
    assert bytes_read_per_token(MINI, gpu) == MINI.output_bytes


def test_an_unused_gpu_needs_nothing():
    unused = shares_of(MINI, ("CPU", CPU, 9), ("G0", GPU, 0))[1]
    assert (unused.layers, unused.total_bytes) == (0, 0)


def test_a_large_vocabulary_shows_in_the_buffers_of_many_slots():
    small, large = alone(MINI, parallel=64), alone(replace(MINI, vocabulary=128_256), parallel=64)
    assert large.compute_bytes - small.compute_bytes > 4 * 64 * 127_000


def test_a_token_reads_every_weight_but_the_embeddings():
    assert bytes_read_per_token(MINI, alone(MINI)) == sum(MINI.layer_bytes) + MINI.output_bytes


def test_a_token_reads_only_the_experts_it_uses():
    experts = MINI.layer_bytes[0] // 2
    shape = replace(MINI, experts=8, experts_used=2, expert_bytes=(experts,) * 8)
    dense = bytes_read_per_token(MINI, alone(MINI))
    assert bytes_read_per_token(shape, alone(shape)) == dense - 8 * (experts * 6 // 8)


@pytest.mark.parametrize(
    "wrong",
    [{"kv_type": "q3_0"}, {"kv_type": ""}, {"context": 0}, {"parallel": 0}, {"ubatch": 0}, {"parallel": -1}],
)
def test_an_impossible_load_is_refused(wrong):
    with pytest.raises(SollolError) as caught:
        alone(MINI, **wrong)
    assert caught.value.refusal.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    "split",
    [
        [("CPU", CPU, 8)],
        [("CPU", CPU, 10)],
        [("G0", GPU, 9)],
        [("CPU", CPU, -1), ("G0", GPU, 10)],
    ],
)
def test_a_split_that_is_none_is_a_programming_error(split):
    with pytest.raises(ValueError, match=r"split|first"):
        shares_of(MINI, *split)


def test_tied_embeddings_are_there_once_where_the_head_is_on_the_host():
    tied = replace(MINI, tied_bytes=MINI.embedding_bytes)
    assert alone(MINI).weight_bytes - alone(tied).weight_bytes == MINI.embedding_bytes
    for shape in (MINI, tied):
        cpu, lent = shares_of(shape, ("CPU", CPU, 0), ("B0", CPU, 9))
        assert cpu.weight_bytes == MINI.embedding_bytes
        assert lent.weight_bytes == sum(MINI.layer_bytes) + MINI.output_bytes


def test_a_backend_has_room_to_receive_its_largest_tensor():
    wide = replace(MINI, output_bytes=10**9, vocabulary=1_000_000)
    for kind, room in ((CPU, True), (GPU, False)):
        lent = shares_of(wide, ("CPU", CPU, 0), ("B0", kind, 9))[1]
        assert (lent.kv_bytes + lent.compute_bytes + lent.margin_bytes > 10**9) is room


def test_the_largest_tensor_is_the_files_own_where_the_report_says_it():
    """Experts' gate and up in one tensor are 63 % of a layer: half a layer was too little room to receive them."""
    heavy = replace(MINI, layer_bytes=(3 * 10**8,) * 8, largest_tensor_bytes=(190 * 10**6,) * 7 + (200 * 10**6,))
    first, last = (shares_of(heavy, ("CPU", CPU, 0), ("B0", CPU, 7), ("B1", CPU, 2))[at] for at in (1, 2))
    assert first.kv_bytes + first.compute_bytes + first.margin_bytes == CPU_MARGIN_BYTES + 190 * 10**6
    assert last.kv_bytes + last.compute_bytes + last.margin_bytes == CPU_MARGIN_BYTES + 200 * 10**6


def test_a_backend_does_not_help_with_the_hosts_layers_as_a_gpu_does():
    lent = shares_of(MID, ("CPU", CPU, 4), ("B0", CPU, 5))[1]
    helping = shares_of(MID, ("CPU", CPU, 4), ("G0", GPU, 5))[1]
    assert helping.compute_bytes - lent.compute_bytes == MID.layer_bytes[0] * 2 // 3


@given(
    counts=st.lists(st.integers(0, 4), min_size=0, max_size=3).filter(lambda counts: sum(counts) <= 9),
    kv_type=st.sampled_from(sorted(KV_TYPES)),
    parallel=st.integers(1, 9),
    context=st.integers(1, 40_000),
)
def test_every_split_holds_the_same_weights_and_conversations(counts, kv_type, parallel, context):
    load = {"kv_type": kv_type, "parallel": parallel, "context": context}
    gpus = [(f"G{at}", GPU, count) for at, count in enumerate(counts)]
    shares = shares_of(MID, ("CPU", CPU, 9 - sum(counts)), *gpus, **load)
    whole = alone(MID, **load)
    assert sum(share.weight_bytes for share in shares) == whole.weight_bytes
    assert sum(share.kv_bytes for share in shares) == whole.kv_bytes
    assert sum(share.layers for share in shares) == 9
    assert sum(bytes_read_per_token(MID, share) for share in shares) == bytes_read_per_token(MID, whole)
