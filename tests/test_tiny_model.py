"""The tiny models do in real llama.cpp what the demo and the other tests rely on."""

import json
import subprocess
import sys

import pytest

from tests.real_engine import real_engine
from tests.tiny_model import (
    EOS,
    PIECES,
    RECITAL,
    VOCABULARY,
    split_into_pieces,
    successors,
    vocabulary,
    write_random_model,
    write_reciting_model,
)

PROMPTS = ["Hello", "x", "Whatever you say, the first falls", "ünïcode 🦙", "two\nlines\n", RECITAL[:300]]


def test_the_models_are_small_and_the_same_every_time(tmp_path):
    one, two, other = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    write_reciting_model(one)
    write_reciting_model(two)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size < 3_000_000
    write_random_model(one, seed=1)
    write_random_model(two, seed=1)
    write_random_model(other, seed=2)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_the_command_writes_either_model(tmp_path):
    for flags in ([], ["--random", "--seed", "3"]):
        path = tmp_path / "m.gguf"
        subprocess.run([sys.executable, "-m", "tests.tiny_model", path, *flags], check=True, timeout=60)
        assert path.read_bytes()[:4] == b"GGUF"


def test_the_recital_is_a_few_hundred_distinct_pieces():
    assert "".join(PIECES) == RECITAL
    assert 200 < len(set(PIECES)) == len(PIECES) < 400
    assert all(RECITAL.count(piece) == 1 for piece in PIECES)


def test_a_text_that_ends_in_a_phrase_it_holds_twice_is_no_recital():
    with pytest.raises(ValueError, match=r"holds twice: ' a b'"):
        split_into_pieces("c a b c a b")


def test_the_table_leads_from_every_token_through_the_whole_recital_to_the_end():
    table, entries = successors(), vocabulary()
    assert set(table) == set(range(VOCABULARY))
    token, said = EOS, []
    while (token := table[token]) != EOS:
        said.append(entries[token][0])
    assert "".join(said) == RECITAL


@pytest.fixture
def reciter(engine_binary, reciting_model, ports, tmp_path):
    with real_engine(engine_binary, reciting_model, ports(), tmp_path / "log", "-c", "4096", "-np", "2") as engine:
        yield engine


@pytest.mark.engine
@pytest.mark.parametrize("prompt", PROMPTS)
def test_whatever_it_is_asked_it_recites_and_ends(reciter, prompt):
    choice = reciter.say(prompt)
    assert choice["message"]["content"] == RECITAL
    assert choice["finish_reason"] == "stop"


@pytest.mark.engine
@pytest.mark.parametrize("cut", [1, 2, 77, len(PIECES) - 1])
def test_it_continues_a_text_that_was_cut_between_two_pieces(reciter, cut):
    said = "".join(PIECES[:cut])
    assert said + reciter.complete(said)["content"] == RECITAL


@pytest.mark.engine
def test_sampling_does_not_disturb_it(reciter):
    assert reciter.say("Hello", temperature=1.0, seed=7)["message"]["content"] == RECITAL


@pytest.mark.engine
def test_without_an_end_it_starts_over(reciter):
    said = reciter.complete("Hello", ignore_eos=True, n_predict=2 * len(PIECES) + 1)["content"]
    assert said == RECITAL + RECITAL + PIECES[0]


@pytest.mark.engine
def test_each_piece_is_one_token(reciter):
    tokens = reciter.post("/tokenize", {"content": RECITAL})["tokens"]
    assert [vocabulary()[token][0] for token in tokens] == list(PIECES)


@pytest.mark.engine
@pytest.mark.parametrize("flags", [("-ctk", "q8_0", "-ctv", "q8_0"), ("-fa", "off", "-ctk", "f32"), ("-ub", "32")])
def test_kv_types_and_batches_do_not_disturb_it(engine_binary, reciting_model, ports, tmp_path, flags):
    with real_engine(engine_binary, reciting_model, ports(), tmp_path / "log", "-c", "1024", *flags) as engine:
        assert engine.say("Hello")["message"]["content"] == RECITAL


@pytest.mark.engine
def test_the_random_model_depends_on_its_whole_context_and_never_ends_by_itself(
    engine_binary, random_model, ports, tmp_path
):
    asked = {"n_predict": 60, "cache_prompt": False}
    with real_engine(engine_binary, random_model, ports(), tmp_path / "log", "-c", "1024") as engine:
        one = engine.complete("one two three", **asked)
        again = engine.complete("one two three", **asked)
        other = engine.complete("nine two three", **asked)
    assert one["content"] == again["content"] != other["content"]
    assert one["stop_type"] == "limit"
    assert one["content"].isascii()


ASK_XLLAMACPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 1024, 1
server = xllamacpp.Server(params)
answer = server.handle_chat_completions({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0})
answer = json.loads(answer) if isinstance(answer, str) else answer
print(json.dumps(answer["choices"][0]["message"]["content"]), flush=True)
"""


@pytest.mark.engine
def test_the_prebuilt_engine_recites_too(reciting_model):
    asked = subprocess.run(
        [sys.executable, "-c", ASK_XLLAMACPP, reciting_model], check=True, timeout=60, capture_output=True
    )
    assert json.loads(asked.stdout.splitlines()[-1]) == RECITAL
