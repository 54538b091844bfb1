from hypothesis import given
from hypothesis import strategies as st

from sollold.turns import Turns


def waiting(*askers):
    turns = Turns()
    for at, asker in enumerate(askers):
        turns.add(asker, (asker, at))
    return turns


def served(turns):
    order = []
    while turns:
        item = turns.first()
        turns.served(item)
        order.append(item)
    return order


def test_one_asker_alone_is_served_in_order():
    assert [at for _, at in served(waiting(*"aaaa"))] == [0, 1, 2, 3]


def test_several_take_turns_each_in_its_own_order():
    assert served(waiting(*"aaaabbc")) == [
        *[("a", 0), ("b", 4), ("c", 6)],
        *[("a", 1), ("b", 5)],
        *[("a", 2), ("a", 3)],
    ]


def test_whoever_comes_back_does_not_come_first():
    turns = waiting(*"aab")
    turns.served(turns.first())
    turns.add("c", "c's")
    assert [turns.first(), len(turns)] == [("b", 2), 3]
    turns.served(turns.first())
    assert turns.first() == ("a", 1)


def test_what_leaves_takes_no_turn():
    turns = waiting(*"aab")
    turns.remove(("a", 0))
    turns.remove(("a", 0))
    assert turns.first() == ("a", 1)
    assert set(turns) == {("a", 1), ("b", 2)}


def test_a_full_queue_takes_from_whoever_has_most():
    turns = waiting(*"aaab")
    assert turns.crowded_out_by("a") is None
    assert turns.crowded_out_by("b") == ("a", 2)
    assert turns.crowded_out_by("c") == ("a", 2)
    assert waiting(*"ab").crowded_out_by("c") is None
    assert waiting(*"aabb").crowded_out_by("b") is None
    assert waiting().crowded_out_by("a") is None


@given(st.lists(st.sampled_from("abcd"), max_size=40))
def test_nobody_is_lost_and_nobody_waits_for_more_than_one_of_each_other_asker(askers):
    order = served(waiting(*askers))
    assert sorted(at for _, at in order) == list(range(len(askers)))
    for asker in set(askers):
        places = [place for place, (whose, _) in enumerate(order) if whose == asker]
        gaps = [later - earlier for earlier, later in zip([-1, *places], places, strict=False)]
        assert max(gaps) <= len(set(askers))
