"""Makes the tiny models that the demo and the tests run real llama.cpp on: `python -m tests.tiny_model OUT.gguf [--random]`.

Both are llama-architecture GGUF files of under 3 MB with a real SPM vocabulary and a ChatML template, and come out
byte-identical for equal arguments, on any machine: every weight is drawn from SHAKE-256 over its tensor's name.
"""

import argparse
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

LAYERS, EMBEDDING, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 8, 128, 4, 2, 256, 768
NORMS = ("attn_norm", "ffn_norm")
CONTEXT = 8192
UNKNOWN, BOS, EOS, START = 0, 1, 2, 3
SPECIALS = ("<unk>", "<s>", "<|im_end|>", "<|im_start|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOP_LOGIT = 40.0  # of the one successor; everything else stays below 20, so sampling at temperature 1 recites too
START_OVER_SHARE = 0.7  # of TOP_LOGIT: what the first piece gets after the last one, behind EOS

_TEXT = """\
SOLLOL is a small orchestra of ordinary computers. One machine keeps sixteen gigabytes and a tired fan, another owns a
graphics card, two more were rescued from an office cupboard. Alone, none can hold a really large language model.
Together they can, provided somebody decides who carries what.

That somebody is called the head. When your question arrives, it first looks around: how much memory does each machine
have free at this moment, not yesterday, not on paper? Which files already lie on which disk? How quickly could every
processor read through its share of weights? From these figures it works out a plan, writes down every reason, and only
then acts. If you ask why, it shows you the table instead of shrugging.

On each machine lives an agent, quiet as a librarian. It measures, it promises, it starts engines and it watches over
them. A promise of memory is kept in a ledger, because two guests must never be sold one chair. When an engine crashes,
the agent notices within a second, saves its last words, gives back what was reserved, and reports honestly what went
wrong. Nothing is hidden behind a cheerful green light.

The engine itself is llama.cpp, unchanged. It opens a model file, multiplies very many numbers, and whispers one token
after another. Those tokens travel home along a single stream which carries hundreds of conversations at once, so a slow
reader never blocks a fast one. Should you close your laptop halfway, your seat is free again before you have left the
room.

Redis hangs on the wall as a notice board. Nodes pin fresh notes there every few seconds, and stale notes simply fall
off. Lose the board, and nobody panics: whoever was talking keeps talking, and old friends still know where to find each
other.

You may wonder who is speaking. This text comes from a toy, three megabytes short, that knows nothing except these
sentences. Its weights are arranged like a row of dominoes: whatever you say, the first falls, then the next, always in
this order, on any processor, split over any number of machines. That makes it useless for poetry but perfect for tests,
since a missing word, or a repeated one, stands out immediately.

Now replace me with something clever. Put a real model into your folder, call it by name, and let your forgotten
hardware answer. Everything you saw here stays the same; just the voice gets better. Thank you for listening, and good
luck with your cluster!
"""
RECITAL = "\n\n".join(" ".join(paragraph.split()) for paragraph in _TEXT.split("\n\n"))
"""What the reciting model says, in words that a newcomer can read."""


def split_into_pieces(text: str) -> tuple[str, ...]:
    """Cut `text` at words into the shortest pieces that each occur in it once.

    A piece is a token, and a token has one successor: a word that comes back is therefore joined with the words after
    it until the phrase is unique. Unique as a substring, so that cutting the text anywhere between two pieces and
    tokenizing what came before yields the same pieces again (continuing a broken stream needs that).
    """
    pieces, piece = [], ""
    for word in re.findall(r"\s*\S+", text):
        piece += word
        if text.count(piece) == 1:
            pieces.append(piece)
            piece = ""
    if piece:
        raise ValueError(f"the text ends in a phrase that it holds twice: {piece!r}")
    return tuple(pieces)


PIECES = split_into_pieces(RECITAL)


def vocabulary() -> list[tuple[str, gguf.TokenType]]:
    """Specials, 256 bytes, the recital's pieces, printable ASCII, then beginnings of words.

    The recital's pieces are "user defined": llama.cpp finds those in a text before it merges characters, longest first.
    """
    entries = [(SPECIALS[UNKNOWN], gguf.TokenType.UNKNOWN)]
    entries += [(name, gguf.TokenType.CONTROL) for name in SPECIALS[1:]]
    entries += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    entries += [(piece, gguf.TokenType.USER_DEFINED) for piece in PIECES]
    entries += [(chr(code), gguf.TokenType.NORMAL) for code in range(0x21, 0x7F)]
    known = {text for text, _ in entries}
    normal = (text for text in itertools.chain(["▁"], _beginnings_of_words()) if not (text in known or known.add(text)))
    entries += [(text, gguf.TokenType.NORMAL) for text in itertools.islice(normal, VOCABULARY - len(entries))]
    assert len(entries) == VOCABULARY
    return entries


def _beginnings_of_words() -> Iterator[str]:
    """Yield ▁t, ▁th, ▁the, …: SPM merges pairs, so every word needs its beginnings in the vocabulary."""
    for word in re.findall(r"[a-z]+", RECITAL):
        for end in range(1, len(word) + 1):
            yield "▁" + word[:end]


def successors() -> dict[int, int]:
    """Token to next token: through the recital, then EOS, and from every other token to the beginning."""
    first = len(SPECIALS) + 256
    chain = [*range(first, first + len(PIECES)), EOS]
    table = dict.fromkeys(range(VOCABULARY), first)
    table.update(itertools.pairwise(chain))
    return table


def write_reciting_model(path: Path) -> None:
    """Write the model that recites `RECITAL` whatever it is asked, then ends (EOS); with `ignore_eos` it starts over.

    How a transformer holds a successor table: each piece of the recital has an embedding of its own, and these are
    nearly orthogonal; all other tokens share one more. The eight layers compute for real, but add only a few percent
    to that vector, so that at the end it still points where it did. Row s of the output matrix is the embedding of the
    token that s follows, scaled: only the successor's logit is large, with a margin that no rounding reaches, whatever
    the split, thread count, batch or KV type. Continuing works from text, when it is cut between two pieces.
    """
    _write(path, "SOLLOL recital", *reciting_matrices(), seed=0, gain=0.02)


def reciting_matrices() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the embeddings and the output matrix of the successor table."""
    embeddings = np.repeat(_signs("embedding/other", (1, EMBEDDING)), VOCABULARY, axis=0)
    first = len(SPECIALS) + 256
    embeddings[first : first + len(PIECES)] = _signs("embedding/pieces", (len(PIECES), EMBEDDING))
    output = np.zeros((VOCABULARY, EMBEDDING), dtype=np.float32)
    for token, following in successors().items():
        output[following] = embeddings[token] * (TOP_LOGIT / EMBEDDING)
    last = first + len(PIECES) - 1
    output[first] = (embeddings[UNKNOWN] + START_OVER_SHARE * embeddings[last]) * (TOP_LOGIT / EMBEDDING)
    return embeddings, output


def write_random_model(path: Path, seed: int = 0) -> None:
    """Write a model with random weights: each token depends on the whole context, and ties are near.

    It says pieces of the recital in no order, never EOS: a request ends at its `max_tokens` or at the context's end.
    Equal requests repeat exactly only with `cache_prompt: false`.
    """
    embeddings = _noise(f"{seed}/embedding", (VOCABULARY, EMBEDDING), 1.0)
    output = np.zeros((VOCABULARY, EMBEDDING), dtype=np.float32)
    first = len(SPECIALS) + 256
    output[first : first + len(PIECES)] = _noise(f"{seed}/output", (len(PIECES), EMBEDDING), 0.5)
    _write(path, f"SOLLOL random {seed}", embeddings, output, seed=seed, gain=1.0)


def _write(path: Path, name: str, embeddings: NDArray, output: NDArray, *, seed: int, gain: float) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, name, FEED_FORWARD)
    writer.add_tensor("token_embd.weight", embeddings.astype(np.float16))
    for layer in range(LAYERS):
        _add_layer(writer, f"blk.{layer}", seed, gain)
    writer.add_tensor("output_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
    writer.add_tensor("output.weight", output.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, name: str, feed_forward: int) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    entries = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_scores([float(-index) for index in range(len(entries))])
    writer.add_token_types([kind for _, kind in entries])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_layer(writer: gguf.GGUFWriter, prefix: str, seed: int, gain: float) -> None:
    for norm in NORMS:
        writer.add_tensor(f"{prefix}.{norm}.weight", np.ones(EMBEDDING, dtype=np.float32))
    for kind, shape in layer_shapes(FEED_FORWARD).items():
        scale = (3.0 / shape[1]) ** 0.5  # keeps the variance of what it is applied to
        if kind in ("attn_output", "ffn_down"):  # the only two that add to the residual
            scale *= gain
        name = f"{prefix}.{kind}.weight"
        writer.add_tensor(name, _noise(f"{seed}/{name}", shape, scale).astype(np.float16))


def layer_shapes(feed_forward: int) -> dict[str, tuple[int, int]]:
    """The matrices of one layer, beside its `NORMS`."""
    kv = EMBEDDING // HEADS * KV_HEADS
    return {
        "attn_q": (EMBEDDING, EMBEDDING),
        "attn_k": (kv, EMBEDDING),
        "attn_v": (kv, EMBEDDING),
        "attn_output": (EMBEDDING, EMBEDDING),
        "ffn_gate": (feed_forward, EMBEDDING),
        "ffn_up": (feed_forward, EMBEDDING),
        "ffn_down": (EMBEDDING, feed_forward),
    }


def _noise(name: str, shape: tuple[int, int], scale: float) -> NDArray[np.float32]:
    """Uniform in ±scale. numpy's generators may change between versions; a hash may not."""
    raw = hashlib.shake_256(name.encode()).digest(2 * shape[0] * shape[1])
    return (np.frombuffer(raw, dtype="<i2").reshape(shape) * np.float32(scale / 32768)).astype(np.float32)


def _signs(name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.where(_noise(name, shape, 1.0) < 0, np.float32(-1), np.float32(1))


def main() -> None:
    parser = argparse.ArgumentParser(description="write a tiny GGUF model for demos and tests")
    parser.add_argument("path", type=Path)
    parser.add_argument("--random", action="store_true", help="random weights instead of the recital")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    if arguments.random:
        write_random_model(arguments.path, arguments.seed)
    else:
        write_reciting_model(arguments.path)
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
