"""What loads have shown is kept over restarts; a file that says nothing to us costs nothing but what was in it."""

import msgspec
import pytest
from msgspec.structs import replace
from sollol.correction import Correction, MemoryCorrection

from agent.learned import FILE_NAME, MOST_KEPT, VERSION, Learned

SHOWN = MemoryCorrection(
    identity="model",
    context_per_slot=4096,
    parallel=2,
    kv_type="f16",
    ubatch=512,
    layout="CPU:9",
    correction=Correction(weights=1.25, added_bytes=77),
)


def test_it_is_known_again_after_a_restart(tmp_path):
    Learned(tmp_path).learn(SHOWN)

    assert Learned(tmp_path).corrections() == (SHOWN,)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_the_same_load_again_replaces_what_it_showed_before_and_another_does_not(tmp_path):
    learned = Learned(tmp_path)
    again = replace(SHOWN, correction=Correction())
    others = [replace(SHOWN, **{name: other}) for name, other in
              {"identity": "x", "context_per_slot": 1, "parallel": 1, "kv_type": "f32", "ubatch": 1, "layout": "x"}.items()]  # fmt: skip

    for each in (SHOWN, *others, again):
        learned.learn(each)

    assert learned.corrections() == (*others, again)


def test_only_the_newest_are_kept(tmp_path):
    learned = Learned(tmp_path)
    for number in range(MOST_KEPT + 5):
        learned.learn(replace(SHOWN, identity=f"{number}"))

    assert [each.identity for each in learned.corrections()] == [f"{number}" for number in range(5, MOST_KEPT + 5)]
    assert Learned(tmp_path).corrections() == learned.corrections()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1, "content": []}', b'{"version": 2, "content": [{}]}'],
)
def test_a_file_that_is_damaged_or_of_another_version_is_put_aside(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)

    learned = Learned(tmp_path)

    assert learned.corrections() == ()
    (aside,) = tmp_path.glob(f"{FILE_NAME}.bad-*")
    assert aside.read_bytes() == content
    learned.learn(SHOWN)
    assert Learned(tmp_path).corrections() == (SHOWN,)


def test_more_than_is_kept_in_the_file_is_cut(tmp_path):
    many = [replace(SHOWN, identity=f"{number}") for number in range(MOST_KEPT + 1)]
    (tmp_path / FILE_NAME).write_bytes(msgspec.json.encode({"version": VERSION, "content": many}))

    assert Learned(tmp_path).corrections() == tuple(many[1:])


def test_where_nothing_can_be_written_it_is_known_until_the_restart(tmp_path):
    learned = Learned(tmp_path / "gone")

    learned.learn(SHOWN)

    assert learned.corrections() == (SHOWN,)
