from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from sollol.report import InstanceState

from agent.supervisor.state import LIVE, Event, after


def reachable(start: InstanceState) -> set[InstanceState]:
    found, todo = {start}, [start]
    while todo:
        state = todo.pop()
        new = {after(state, event) for event in Event} - found
        found |= new
        todo += new
    return found


def test_every_state_is_reachable_from_stopped() -> None:
    assert reachable(InstanceState.STOPPED) == set(InstanceState)


def test_every_live_state_can_reach_stopped_and_what_died_never_lives_again() -> None:
    assert all(InstanceState.STOPPED in reachable(state) for state in LIVE)
    assert not reachable(InstanceState.FAILED) & LIVE


def test_only_exited_leaves_the_live_states() -> None:
    left = {event for state, event in product(LIVE, Event) if after(state, event) not in LIVE}
    assert left == {Event.EXITED}


def test_only_start_enters_the_live_states() -> None:
    dead = set(InstanceState) - LIVE
    assert {event for state, event in product(dead, Event) if after(state, event) in LIVE} == {Event.START}


@given(st.lists(st.sampled_from(Event)))
def test_a_process_exists_exactly_in_the_live_states(events: list[Event]) -> None:
    """A START that is taken makes the process, an EXITED of it ends it; nothing else happens to it."""
    state, process = InstanceState.STOPPED, False
    for event in events:
        new = after(state, event)
        if event is Event.START and new is not state:
            process = True
        if event is Event.EXITED:
            process = False
        state = new
        assert process == (state in LIVE)


def test_an_exit_counts_as_stopped_only_when_it_was_asked_for() -> None:
    ends = {state: after(state, Event.EXITED) for state in LIVE}
    assert [state for state, end in ends.items() if end is InstanceState.STOPPED] == [InstanceState.STOPPING]
    assert {end for state, end in ends.items() if state is not InstanceState.STOPPING} == {InstanceState.FAILED}
