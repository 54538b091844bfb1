"""Shapes of headers in the manner of real architectures; the engine's rules are quoted where a test needs them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError
from sollol.gguf import has_chat_template, quantization_of
from sollol.gguf_split import read_model
from sollol.memory import device_shares, kv_bytes
from sollol.report import DeviceKind
from sollol.shape import shape_of

from tests.gguf_bytes import gguf, llama_metadata, llama_tensors
from tests.tiny_model import LAYERS, write_reciting_model

LAYER_BYTES = 8 * 8 * 4


@pytest.fixture
def shape(tmp_path):
    """Shape of a file made of `metadata` and `tensors`; "llama." in keys becomes the architecture's name."""

    def build(architecture="llama", layers=2, tensors=None, without=(), **more):
        metadata = llama_metadata(layers, **{f"llama__{key}": content for key, content in more.items()})
        metadata = {
            key.replace("llama.", f"{architecture}."): content
            for key, content in metadata.items()
            if key not in without
        }
        metadata["general.architecture"] = architecture
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf(metadata, tensors or llama_tensors(layers)))
        return shape_of(read_model([path]))

    return build


def refusal_of(build, **arguments):
    with pytest.raises(SollolError) as caught:
        build(**arguments)
    return caught.value.refusal


def test_the_tiny_model_has_the_shape_it_was_made_with(tmp_path):
    write_reciting_model(tmp_path / "tiny.gguf")
    headers = read_model([tmp_path / "tiny.gguf"])
    shape = shape_of(headers)
    assert (shape.architecture, shape.layers, shape.heads, shape.kv_heads) == ("llama", LAYERS, 4, (2,) * LAYERS)
    assert (shape.embedding_length, shape.feed_forward_length, shape.vocabulary) == (128, 256, 768)
    assert (shape.key_length, shape.value_length, shape.context_length) == (32, 32, 8192)
    sizes = sum(shape.layer_bytes) + shape.embedding_bytes + shape.output_bytes
    assert sizes == sum(tensor.size_bytes for tensor in headers[0].tensors)
    assert quantization_of(headers) == "F16"
    assert has_chat_template(headers[0])


def test_bytes_are_counted_where_the_engine_puts_them(shape):
    found = shape()
    assert found.layer_bytes == (LAYER_BYTES, LAYER_BYTES)
    assert found.embedding_bytes == 8 * 3 * 4
    assert found.output_bytes == 8 * 3 * 4 + 8 * 4


def test_without_an_output_head_the_embeddings_are_copied_to_it(shape):
    tensors = llama_tensors()
    del tensors["output.weight"]
    assert shape(tensors=tensors).output_bytes == 8 * 3 * 4 + 8 * 4


def test_other_embeddings_stay_on_the_host_too(shape):
    tensors = llama_tensors() | {"per_layer_token_embd.weight": (8, 100), "token_embd_norm.weight": (8,)}
    found = shape(tensors=tensors)
    assert found.embedding_bytes == 8 * 3 * 4 + 8 * 100 * 4
    assert found.output_bytes == 8 * 3 * 4 + 8 * 4 + 8 * 4


def test_heads_may_differ_from_layer_to_layer(shape):
    found = shape(layers=3, attention__head_count=[2, 4, 2], attention__head_count_kv=[1, 2, 0])
    assert (found.heads, found.kv_heads) == (4, (1, 2, 0))


def test_without_kv_heads_every_head_has_its_own(shape):
    assert shape(without=("llama.attention.head_count_kv",)).kv_heads == (2, 2)


def test_head_sizes_that_are_given_count(shape):
    found = shape(attention__key_length=6, attention__value_length=5)
    assert (found.key_length, found.value_length) == (6, 5)
    assert shape(attention__key_length=6, attention__key_length_swa=7).key_length == 7


def test_mla_keeps_only_compressed_keys(shape):
    found = shape("deepseek2", attention__key_length=576, attention__value_length=512, attention__key_length_mla=192)
    assert (found.key_length, found.value_length) == (576, 0)


def test_the_keys_of_an_indexer_are_cached_beside_the_others(shape):
    plain = {"attention__key_length": 576, "attention__value_length": 512, "attention__key_length_mla": 192}
    load = {"context_per_slot": 512, "parallel": 2, "kv_type": "f16", "ubatch": 512}
    with_indexer = shape("deepseek32", **plain, attention__indexer__key_length=128)
    more = kv_bytes(with_indexer, 0, **load) - kv_bytes(shape("deepseek32", **plain), 0, **load)
    assert more == 2 * 512 * 128 * 2


def test_experts_are_counted_apart_and_together(shape):
    tensors = llama_tensors() | {"blk.1.ffn_up_exps.weight": (8, 4, 4), "blk.1.ffn_gate_inp.weight": (8, 4)}
    found = shape(tensors=tensors, expert_count=4, expert_used_count=2, expert_feed_forward_length=12)
    assert (found.experts, found.experts_used) == (4, 2)
    assert found.expert_bytes == (0, 8 * 4 * 4 * 4)
    assert found.layer_bytes == (LAYER_BYTES, LAYER_BYTES + 8 * 4 * 4 * 4 + 8 * 4 * 4)
    assert found.feed_forward_length == 24


def test_the_largest_tensor_of_each_layer_is_known(shape):
    found = shape(tensors=llama_tensors() | {"blk.1.ffn_gate_up_exps.weight": (8, 8, 4)}, expert_count=4)
    assert found.largest_tensor_bytes == (LAYER_BYTES, 8 * 8 * 4 * 4)


@pytest.mark.parametrize(
    ("architecture", "sliding"),
    [  # il % n_pattern < n_pattern - 1, or il % n_pattern != 0 where the dense layer comes first
        ("gemma2", (True, False) * 3),
        ("gemma3", (True, True, True, True, True, False)),
        ("gpt-oss", (True, False) * 3),
        ("smallthinker", (False, True, True, True, False, True)),
    ],
)
def test_the_layers_that_slide_are_the_engines(shape, architecture, sliding):
    found = shape(architecture, layers=6, attention__sliding_window=512)
    assert (found.sliding_window, found.sliding_layers) == (512, sliding)


def test_a_pattern_in_the_file_wins(shape):
    listed = shape("gemma4", attention__sliding_window=512, attention__sliding_window_pattern=[True, False])
    assert listed.sliding_layers == (True, False)
    period = shape("gemma3", layers=4, attention__sliding_window=512, attention__sliding_window_pattern=2)
    assert period.sliding_layers == (True, False, True, False)


def test_a_window_that_the_engine_ignores_is_ignored(shape):
    assert shape("phi3", attention__sliding_window=512).sliding_window == 0
    assert shape("mistral-of-tomorrow", attention__sliding_window=512).sliding_window == 0


def test_gemma2_slides_without_saying_so(shape):
    assert shape("gemma2").sliding_window == 4096


def test_mamba_keeps_a_state_in_every_layer_and_no_kv_cache(shape):
    found = shape("mamba", ssm__conv_kernel=4, ssm__inner_size=16, ssm__state_size=16, attention__head_count_kv=0)
    assert found.kv_heads == (0, 0)
    assert found.recurrent_bytes == (4 * (3 * 16 + 16 * 16),) * 2


def test_rwkv_keeps_token_shifts_and_a_state_per_head(shape):
    found = shape("rwkv6", wkv__head_size=4)
    assert (found.kv_heads, found.recurrent_bytes) == ((0, 0), (4 * 8 * (2 + 4),) * 2)


def test_hybrids_keep_one_or_the_other(shape):
    state = {"ssm__conv_kernel": 4, "ssm__inner_size": 16, "ssm__state_size": 16}
    found = shape("jamba", layers=3, attention__head_count_kv=[0, 1, 0], **state)
    assert found.kv_heads == (0, 1, 0)
    assert [size > 0 for size in found.recurrent_bytes] == [True, False, True]
    every_fourth = shape("qwen3next", layers=8, **state)
    assert every_fourth.kv_heads == (0, 0, 0, 1) * 2
    assert [size > 0 for size in every_fourth.recurrent_bytes] == [True, True, True, False] * 2


def test_falcon_h1_keeps_both_in_every_layer(shape):
    found = shape("falcon-h1", ssm__conv_kernel=4, ssm__inner_size=16, ssm__state_size=16, ssm__group_count=1)
    assert found.kv_heads == (1, 1)
    assert found.recurrent_bytes == (4 * (3 * (16 + 32) + 256),) * 2


def test_layers_that_share_a_cache_have_none_of_their_own(shape):
    found = shape("gemma4", layers=4, attention__shared_kv_layers=2, attention__sliding_window=8)
    assert found.kv_heads == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"block_count": 0}, "claims 0 layers"),
        ({"block_count": 100_000}, "claims 100000 layers"),
        ({"block_count": "many"}, "block_count is 'many', no sensible number"),
        ({"block_count": 4}, "layer 2 of 4 has no weights"),
        ({"block_count": 1}, "tensor 'blk.1.attn_q.weight' is beyond its 1 layers"),
        ({"attention__head_count_kv": [1]}, "has 1 entries for 2 layers"),
        ({"attention__key_length": 0xFFFFFFFF}, "no sensible number"),
        ({"attention__key_length": 1 << 30}, "is absurd"),
        ({"embedding_length": 0}, "embedding length"),
        ({"expert_count": 2048}, "expert_count is 2048, must be at most 1024"),
        ({"expert_count": 8, "expert_used_count": 1 << 31}, "expert_used_count is 2147483648, must be at most 1024"),
        ({"without": ("llama.embedding_length",)}, "embedding length"),
    ],
)
def test_figures_that_cannot_be_are_refused(shape, arguments, why):
    refusal = refusal_of(shape, **arguments)
    assert refusal.reason is Reason.MODEL_CORRUPT
    assert why in refusal.message
    assert "'model.gguf'" in refusal.message


EXTREMES = st.sampled_from([0, 1, 2, 3, 64, 1024, 1025, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
FIGURES = (
    "embedding_length", "feed_forward_length", "context_length", "vocab_size", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "attention__head_count", "attention__head_count_kv", "attention__key_length",
    "attention__value_length", "attention__sliding_window", "attention__sliding_window_pattern",
    "attention__shared_kv_layers", "attention__indexer__key_length", "full_attention_interval", "nextn_predict_layers",
    "token_shift_count", "wkv__head_size", "ssm__inner_size", "ssm__state_size", "ssm__group_count",
    "ssm__time_step_rank", "ssm__conv_kernel", "shortconv__l_cache", "kda__head_dim",
)  # fmt: skip


@given(
    architecture=st.sampled_from(["llama", "qwen3moe", "gemma3", "mamba", "mamba2", "rwkv7", "qwen3next", "falcon-h1"]),
    figures=st.dictionaries(st.sampled_from(FIGURES), EXTREMES, max_size=6),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_header_claims_is_refused_or_computed_at_once(shape, architecture, figures):
    """No figure decides how long a head computes: a loop of 2**31 turns would never end here."""
    experts = {f"blk.{layer}.ffn_up_exps.weight": (8, 4, 4) for layer in range(2)}
    try:
        found = shape(architecture, tensors=llama_tensors() | experts, **figures)
    except SollolError as error:
        found, reason = None, error.refusal.reason
    if found is None:
        assert reason is Reason.MODEL_CORRUPT
        return
    split = (("CPU", DeviceKind.CPU, 1), ("GPU", DeviceKind.GPU, 2))
    shares = device_shares(found, split, context_per_slot=512, parallel=2, kv_type="q8_0", ubatch=512)
    assert sum(share.total_bytes for share in shares) < 1 << 63


def test_a_vocabulary_without_weights_is_no_model(tmp_path):
    (tmp_path / "vocab.gguf").write_bytes(gguf(llama_metadata()))
    with pytest.raises(SollolError, match=r"layer 0 of 2 has no weights"):
        shape_of(read_model([tmp_path / "vocab.gguf"]))


def test_without_an_architecture_it_is_refused(tmp_path):
    (tmp_path / "odd.gguf").write_bytes(gguf({"llama.block_count": 2}, llama_tensors()))
    with pytest.raises(SollolError, match=r"names no architecture"):
        shape_of(read_model([tmp_path / "odd.gguf"]))


def test_additions_to_a_model_are_unsupported(shape):
    refusal = refusal_of(shape, architecture="clip")
    assert refusal.reason is Reason.MODEL_UNSUPPORTED
    assert "no language model" in refusal.message


@pytest.mark.parametrize(("number", "name"), [(15, "Q4_K_M"), (1 + 1024, "F16"), (None, "F32"), (999, "F32")])
def test_the_quantization_is_the_files_word_or_that_of_most_bytes(tmp_path, number, name):
    said = {} if number is None else {"general.file_type": number}
    (tmp_path / "q.gguf").write_bytes(gguf(llama_metadata() | said, llama_tensors()))
    assert quantization_of(read_model([tmp_path / "q.gguf"])) == name
