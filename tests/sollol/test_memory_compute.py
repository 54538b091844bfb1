"""The engine's allocator as rules, and properties of the rehearsal that hold for every model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sollol.compute import device
from sollol.compute.allocator import ALIGNMENT, Rehearsal
from sollol.compute.device import Part, compute_bytes
from sollol.compute.scene import Batch
from sollol.gguf_split import read_model
from sollol.shape import shape_of

from tests.many_architectures import ARCHITECTURES, write_model

KB = 1024
MIB = 1024**2
BATCH = Batch(tokens=512, sequences=1, cells=4096, sliding_cells=1024, quantized_kv=False, f32_kv=False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The shape of every model that the tests can make."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, architecture in ARCHITECTURES.items():
        path = folder / "model.gguf"
        write_model(path, architecture)
        found[name] = shape_of(read_model([path]))
    return found


def alone(shape):
    return Part(0, shape.layers + 1, on_cpu=True, after_cpu=False, all_offloaded=False, copies=1)


def lent(first, stop, *, copies=1, all_offloaded=True):
    return Part(first, stop, on_cpu=False, after_cpu=first == 0, all_offloaded=all_offloaded, copies=copies)


def test_what_nobody_uses_any_more_makes_room():
    room = Rehearsal()
    x = room.node(4 * KB)
    for _ in range(10):
        x = room.node(4 * KB, x)
    assert room.peak_bytes() == 8 * KB


def test_an_operation_may_overwrite_an_operand_that_it_is_the_last_to_use():
    room = Rehearsal()
    x = room.node(4 * KB)
    y = room.over(x)
    room.over(y)
    assert room.peak_bytes() == 4 * KB


def test_an_operand_that_is_used_again_is_not_overwritten():
    room = Rehearsal()
    x = room.node(4 * KB)
    y = room.over(x)
    room.node(0, x, y)
    assert room.peak_bytes() == 8 * KB


def test_a_hole_is_filled_by_what_fits_best():
    room = Rehearsal()
    small, wall = room.node(2 * KB), room.node(KB)
    large, end = room.node(4 * KB), room.node(KB)
    room.node(0, small, large)  # both go, between walls
    room.node(2 * KB)  # into the small hole
    room.node(4 * KB)  # into the large one
    room.node(0, wall, end)
    assert room.peak_bytes() == 8 * KB


def test_kept_inputs_stay_and_others_go():
    for kept, peak in ((True, 8), (False, 4)):
        room = Rehearsal()
        x = room.input(4 * KB, kept=kept)
        room.node(0, x)
        room.node(4 * KB)
        assert room.peak_bytes() == peak * KB


def test_sizes_are_aligned():
    room = Rehearsal()
    room.node(0, room.node(1), room.node(1))
    assert room.peak_bytes() == 2 * ALIGNMENT


@pytest.mark.parametrize(
    ("name", "logged_mib"),
    [  # by llama-server on the CPU, for BATCH
        ("llama", 17.01),
        ("qwen3", 17.01),
        ("phi3", 16.01),
        ("gemma2", 18.02),
        ("mamba", 13.09),
        ("mamba2", 14.56),
        ("rwkv7", 19.38),
    ],
)
def test_a_model_on_the_cpu_needs_the_buffer_that_the_engine_logs(shapes, name, logged_mib):
    assert compute_bytes(shapes[name], BATCH, alone(shapes[name])) / MIB == pytest.approx(logged_mib, abs=0.006)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "rwkv7"])
def test_a_few_equal_layers_need_what_many_do(shapes, name, monkeypatch):
    """Rehearsing every layer of a deep model gives the same, only slower."""
    shape = shapes[name]
    times = 5
    deep = replace(
        shape,
        layers=times * shape.layers,
        layer_bytes=shape.layer_bytes * times,
        kv_heads=shape.kv_heads * times,
        sliding_layers=shape.sliding_layers * times,
        expert_bytes=shape.expert_bytes * times,
        recurrent_bytes=shape.recurrent_bytes * times,
    )
    parts = [alone(deep), lent(0, 14), lent(14, deep.layers + 1, copies=4)]
    quick = [compute_bytes(deep, BATCH, part) for part in parts]
    monkeypatch.setattr(device, "FIRST_EQUAL", 1000)
    monkeypatch.setattr(device, "MOST_LAYERS", 1000)
    assert [compute_bytes(deep, BATCH, part) for part in parts] == quick


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(ARCHITECTURES)),
    cut=st.integers(0, 40),
    micro_batch=st.tuples(st.integers(1, 2048), st.integers(1, 9)),
    all_offloaded=st.booleans(),
)
def test_every_cut_of_every_model_can_be_rehearsed(shapes, name, cut, micro_batch, all_offloaded):
    """Also those that no engine was asked about: the front on the CPU or a device, the rest on another."""
    shape = shapes[name]
    tokens, sequences = micro_batch
    batch = replace(BATCH, tokens=tokens * sequences, sequences=sequences)
    cut = min(cut, shape.layers)
    front = lent(0, cut) if all_offloaded else replace(alone(shape), stop=cut)
    rest = Part(cut, shape.layers + 1, False, not all_offloaded, all_offloaded, 4 if all_offloaded else 1)
    for part in (front, rest) if cut else (rest,):
        assert compute_bytes(shape, batch, part) > 0


def test_tied_embeddings_are_known_unless_the_engine_repacks_them(shapes):
    embeddings = shapes["llama, tied"].embedding_bytes
    assert (shapes["llama"].tied_bytes, shapes["llama, tied"].tied_bytes) == (0, embeddings)
    assert shapes["llama, tied, Q8_0"].tied_bytes == shapes["llama, tied, Q8_0"].embedding_bytes
    assert shapes["llama, tied, Q4_0"].tied_bytes == 0
    assert shapes["llama, tied, Q4_0"].output_bytes > shapes["llama, tied, Q4_0"].embedding_bytes
