"""The reader against the `gguf` package's own, against every way to be damaged, and against random bytes."""

import os
import struct
import time
import tracemalloc

import gguf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError
from sollol.gguf import MOST_ENTRIES, Skipped, read_header
from sollol.gguf_split import read_model, split_siblings
from sollol.shape import shape_of

from tests.gguf_bytes import ARRAY, STRING, entry, llama_metadata, llama_tensors, tensor, text, value
from tests.gguf_bytes import gguf as gguf_file
from tests.tiny_model import write_random_model, write_reciting_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_reciting_model(path)
    return path


def refused(tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(SollolError) as caught:
        read_header(path)
    return caught.value.refusal


def head(tensors=0, entries=0, version=3, magic=b"GGUF"):
    return struct.pack("<4sIQQ", magic, version, tensors, entries)


@pytest.mark.parametrize("write", [write_reciting_model, write_random_model])
def test_it_agrees_with_the_gguf_package(tmp_path, write):
    path = tmp_path / "model.gguf"
    write(path)
    theirs = gguf.GGUFReader(path)
    ours = read_header(path)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    for key, kept in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert kept == (
            Skipped(len(expected))
            if isinstance(expected, list) and isinstance(kept, Skipped)
            else tuple(expected)
            if isinstance(expected, list)
            else pytest.approx(expected)
            if isinstance(expected, float)
            else expected
        )
    assert [
        (
            item.name,
            tuple(int(dim) for dim in item.shape),
            int(item.tensor_type),
            int(item.data_offset),
            int(item.n_bytes),
        )
        for item in theirs.tensors
    ] == [(item.name, item.dims, item.type, item.offset, item.size_bytes) for item in ours.tensors]
    assert ours.header_bytes == theirs.data_offset
    assert ours.file_size == path.stat().st_size


def test_version_2_reads_like_version_3(tmp_path):
    (tmp_path / "2.gguf").write_bytes(gguf_file(llama_metadata(), llama_tensors(), version=2))
    header = read_header(tmp_path / "2.gguf")
    assert header.version == 2
    assert header.metadata["llama.block_count"] == 2


def test_every_scalar_type_is_read(tmp_path):
    scalars = {
        "u8": (struct.pack("<IB", 0, 200), 200),
        "i8": (struct.pack("<Ib", 1, -3), -3),
        "u16": (struct.pack("<IH", 2, 60000), 60000),
        "i16": (struct.pack("<Ih", 3, -300), -300),
        "u32": (struct.pack("<II", 4, 1 << 31), 1 << 31),
        "i32": (struct.pack("<Ii", 5, -1), -1),
        "f32": (struct.pack("<If", 6, 0.5), 0.5),
        "bool": (struct.pack("<I?", 7, True), True),
        "u64": (struct.pack("<IQ", 10, 1 << 63), 1 << 63),
        "i64": (struct.pack("<Iq", 11, -(1 << 60)), -(1 << 60)),
        "f64": (struct.pack("<Id", 12, 0.25), 0.25),
        "text": (value("grün"), "grün"),
        "list": (value([1, 2, 3]), (1, 2, 3)),
    }
    path = tmp_path / "scalars.gguf"
    path.write_bytes(gguf_file({key: raw for key, (raw, _) in scalars.items()}))
    assert read_header(path).metadata == {key: expected for key, (_, expected) in scalars.items()}


def test_big_values_are_stepped_over_and_counted(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(
        gguf_file({"numbers": list(range(5000)), "words": ["x"] * 300_000, "essay": "y" * 100_000, "after": 7})
    )
    assert read_header(path).metadata == {
        "numbers": Skipped(5000),
        "words": Skipped(300_000),
        "essay": Skipped(100_000),
        "after": 7,
    }


DAMAGED = {
    "an empty file": (b"", "begins with b''"),
    "three bytes": (b"GGU", "begins with b'GGU'"),
    "another format": (b"PK\x03\x04" + bytes(100), "no GGUF file"),
    "only the magic": (b"GGUF", "the file ends after 4 bytes"),
    "version 0": (head(version=0), "version is 0"),
    "no counts": (head()[:12], "in the middle of its header"),
    "too many tensors": (head(tensors=MOST_ENTRIES + 1), "claims 65537 tensors"),
    "too many entries": (head(entries=1 << 63), "metadata entries, more than"),
    "an endless key": (head(entries=1) + struct.pack("<Q", 1 << 62), "a metadata key claims"),
    "a key beyond the end": (head(entries=1) + struct.pack("<Q", 100) + b"abc", "in the middle of its header"),
    "an empty key": (head(entries=1) + entry("", 1), "is empty, there twice"),
    "a key twice": (head(entries=2) + entry("a", 1) + entry("a", 1), "is empty, there twice"),
    "an unknown value type": (head(entries=1) + text("a") + struct.pack("<II", 77, 0), "unknown type 77"),
    "an unknown array type": (
        head(entries=1) + text("a") + struct.pack("<IIQ", ARRAY, 13, 1) + bytes(8),
        "unknown type 13",
    ),
    "an endless string": (head(entries=1) + text("a") + struct.pack("<IQ", STRING, 1 << 40), "claims 1099511627776"),
    "an endless array": (head(entries=1) + text("a") + struct.pack("<IIQ", ARRAY, 4, 1 << 60), "elements, more than"),
    "an array beyond the end": (
        head(entries=1) + text("a") + struct.pack("<IIQ", ARRAY, 4, 1 << 20),
        "in the middle of its header",
    ),
    "too many strings": (
        head(entries=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 24),
        "more than 4194304 strings",
    ),
    "an endless string in an array": (
        head(entries=1) + text("a") + struct.pack("<IIQQ", ARRAY, STRING, 2, 1 << 60),
        "a string in the array 'a' claims",
    ),
    "alignment 0": (gguf_file({"general.alignment": 0}), "no power of 2"),
    "alignment 3": (gguf_file({"general.alignment": 3}), "no power of 2"),
    "alignment as text": (gguf_file({"general.alignment": "32"}), "no power of 2"),
    "huge alignment": (gguf_file({"general.alignment": 1 << 30}), "no power of 2"),
    "an endless tensor name": (head(tensors=1) + struct.pack("<Q", 64) + b"x" * 64, "a tensor's name claims 64 bytes"),
    "no dimensions": (head(tensors=1) + tensor("t", (), 0, 0), "claims 0 dimensions"),
    "five dimensions": (head(tensors=1) + tensor("t", (1,) * 5, 0, 0), "claims 5 dimensions"),
    "a dimension of 0": (head(tensors=1) + tensor("t", (4, 0), 0, 0) + bytes(64), "impossible shape (4, 0)"),
    "dimensions that overflow": (
        head(tensors=1) + tensor("t", (1 << 32, 1 << 32, 1 << 32), 0, 0) + bytes(64),
        "impossible shape",
    ),
    "half a block": (head(tensors=1) + tensor("t", (33,), 2, 0) + bytes(64), "impossible shape (33,)"),
    "a tensor twice": (
        head(tensors=2) + tensor("t", (8,), 0, 0) + tensor("t", (8,), 0, 32) + bytes(128),
        "is there twice",
    ),
    "data that overlap": (
        head(tensors=2) + tensor("t", (8,), 0, 0) + tensor("u", (8,), 0, 0) + bytes(128),
        "begins at 0 and not at 32",
    ),
    "an offset that overflows": (
        head(tensors=1) + tensor("t", (8,), 0, (1 << 64) - 32) + bytes(128),
        "and not at 0",
    ),
    "data beyond the end": (head(tensors=1) + tensor("t", (1 << 40,), 0, 0) + bytes(64), "it is incomplete"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_refusal_that_says_what_and_where(tmp_path, name):
    content, why = DAMAGED[name]
    refusal = refused(tmp_path, content)
    assert refusal.reason is Reason.MODEL_CORRUPT
    assert why in refusal.message
    assert "'bad.gguf' is damaged at byte" in refusal.message
    assert "download or copy it again" in refusal.message
    assert refusal.numbers["file_size_bytes"] == len(content)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (head(version=1), "version 1 is unknown here"),
        (head(version=4), "version 4 is unknown here"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (head(tensors=1) + tensor("t", (8,), 4, 0) + bytes(64), "has the type 4, unknown here"),
        (head(tensors=1) + tensor("t", (8,), 999, 0) + bytes(64), "has the type 999, unknown here"),
        (head(entries=1) + text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "array of arrays"),
    ],
)
def test_what_is_legal_but_unknown_here_is_unsupported(tmp_path, content, why):
    refusal = refused(tmp_path, content)
    assert refusal.reason is Reason.MODEL_UNSUPPORTED
    assert why in refusal.message


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo], ids=["absent", "dir", "fifo"]
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "odd.gguf"
    make(path)
    with pytest.raises(SollolError) as caught:
        read_header(path)
    assert caught.value.refusal.reason is Reason.MODEL_CORRUPT
    assert "'odd.gguf'" in caught.value.refusal.message


def test_a_model_cut_anywhere_is_refused(tiny, tmp_path):
    content = tiny.read_bytes()
    for length in [*range(0, 200, 7), *range(200, 24_000, 997), len(content) - 33]:
        assert refused(tmp_path, content[:length]).reason is Reason.MODEL_CORRUPT


def strings_without_end(path, count):
    """A file that claims one string more than it holds."""
    claims = text("a") + struct.pack("<IIQ", ARRAY, STRING, count + 1)
    path.write_bytes(head(entries=1) + claims + struct.pack("<Q", 0) * count)


def test_a_huge_claim_costs_no_memory(tmp_path):
    strings_without_end(tmp_path / "huge.gguf", 300_000)
    tracemalloc.start()
    with pytest.raises(SollolError):
        read_header(tmp_path / "huge.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 1024**2


def test_the_longest_claim_is_answered_in_seconds(tmp_path):
    strings_without_end(tmp_path / "huge.gguf", 4_000_000)
    started = time.process_time()
    with pytest.raises(SollolError):
        read_header(tmp_path / "huge.gguf")
    assert time.process_time() - started < 10  # measured: under 2


def refusal_of_reading(path):
    try:
        shape_of(read_model([path]))
    except SollolError as error:
        return error.refusal
    return None


def readable_or_refused(path):
    refusal = refusal_of_reading(path)
    if refusal is not None:
        assert refusal.reason in {Reason.MODEL_CORRUPT, Reason.MODEL_UNSUPPORTED}
        assert len(refusal.message) < 600
        assert refusal.message.isprintable()


FUZZ = settings(max_examples=150, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=st.binary(max_size=400))
@example(content=b"")
def test_random_bytes_after_the_magic_are_refused_or_read(tmp_path, content):
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
    readable_or_refused(path)


SMALL = gguf_file(llama_metadata(), llama_tensors())


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    length=st.integers(0, len(SMALL)),
    cut=st.booleans(),
)
def test_a_mutated_model_is_refused_or_read(tmp_path, changes, length, cut):
    content = bytearray(SMALL)
    for at, byte in changes:
        content[at] = byte
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content[:length] if cut else content)
    readable_or_refused(path)


@FUZZ
@given(number=st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF]), at=st.integers(0, len(SMALL) - 8), wide=st.booleans())
def test_extreme_numbers_anywhere_are_refused_or_read(tmp_path, number, at, wide):
    raw = struct.pack("<Q", number << 32 | number) if wide else struct.pack("<I", number)
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(SMALL[:at] + raw + SMALL[at + len(raw) :])
    readable_or_refused(path)


def part(number, count, tensors, **more):
    metadata = {"split.no": number, "split.count": count, "split.tensors.count": 5, **more}
    return gguf_file(llama_metadata() | metadata if number == 0 else metadata, tensors)


@pytest.fixture
def parts(tmp_path):
    items = list(llama_tensors().items())
    paths = split_siblings(tmp_path / "model-00002-of-00003.gguf")
    for number, path in enumerate(paths):
        path.write_bytes(part(number, 3, dict(items[2 * number : 2 * number + 2])))
    return paths


def test_any_part_leads_to_all_parts_in_order(tmp_path):
    names = [path.name for path in split_siblings(tmp_path / "m-00003-of-00003.gguf")]
    assert names == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]


@pytest.mark.parametrize(
    "name", ["m.gguf", "m-1-of-3.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-99999.gguf"]
)
def test_other_names_stand_alone(tmp_path, name):
    assert split_siblings(tmp_path / name) == (tmp_path / name,)


def test_a_split_model_has_the_shape_of_the_whole_one(parts, tmp_path):
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(SMALL)
    assert shape_of(read_model(parts)) == shape_of(read_model([whole]))


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(SollolError, match=r"part 2 of 3 is missing: put 'model-00002-of-00003.gguf' beside the others"):
        read_model(parts)


def test_parts_under_each_others_names_are_refused(parts):
    parts[1].rename(parts[1].with_name("other"))
    parts[2].rename(parts[1])
    parts[1].with_name("other").rename(parts[2])
    with pytest.raises(SollolError, match=r"found as part 2 of 3, but says it is part 3 of 3"):
        read_model(parts)


def test_a_part_under_a_whole_models_name_is_refused(parts):
    with pytest.raises(SollolError, match=r"found as part 1 of 1, but says it is part 1 of 3"):
        read_model(parts[:1])


def test_parts_of_different_models_are_refused(parts):
    parts[2].write_bytes(part(2, 3, {"extra.weight": (8,), "extra.bias": (8,)}))
    with pytest.raises(SollolError, match=r"hold 6 tensors, 6 different ones, but 5 belong"):
        read_model(parts)
