from math import isclose

from hypothesis import given
from hypothesis import strategies as st

from agent.rate import MOST_BYTES, MOST_S, Arrived, bytes_per_s, enough


def steady(rate, pieces, size=1000):
    return [Arrived(at * size / rate, (at + 1) * size) for at in range(pieces)]


@given(st.floats(1e3, 1e9), st.integers(2, 200))
def test_a_steady_flow_has_its_rate_whatever_the_number_of_pieces(rate, pieces):
    assert isclose(bytes_per_s(steady(rate, pieces)), rate, rel_tol=1e-6)


def test_a_burst_at_the_beginning_does_not_count():
    burst = [Arrived(0.0, 4096), Arrived(0.0001, 200_000)]
    flow = [Arrived(0.01 * at, 200_000 + 10_000 * at) for at in range(1, 51)]

    assert isclose(bytes_per_s(burst + flow), 1e6, rel_tol=0.01)


def test_a_slow_start_counts_little():
    start = [Arrived(0.02 * at, 1000 * 2**at) for at in range(6)]
    flow = [Arrived(0.1 + 0.01 * at, 32_000 + 100_000 * at) for at in range(1, 41)]

    assert isclose(bytes_per_s(start + flow), 1e7, rel_tol=0.03)


def test_two_pieces_far_apart_still_tell():
    assert isclose(bytes_per_s([Arrived(0.0, 4096), Arrived(2.0, 8192)]), 2048)


def test_of_a_slow_link_with_a_burst_the_piece_behind_it_tells():
    burst = [Arrived(0.0, 4096), Arrived(0.001, 8192), Arrived(0.002, 12_288)]
    assert isclose(bytes_per_s([*burst, Arrived(2.002, 16_384)]), 2048)


def test_silence_behind_a_burst_makes_it_slow():
    burst = [Arrived(0.0, 4096), Arrived(0.01, 8192)]
    assert isclose(bytes_per_s([*burst, Arrived(4.0, 8192)]), 1024)
    assert bytes_per_s([Arrived(0.0, 4096), Arrived(4.0, 4096)]) == 0


def test_less_tells_nothing():
    assert bytes_per_s([]) == 0
    assert bytes_per_s([Arrived(0.0, 4096)]) == 0
    assert bytes_per_s([Arrived(0.0, 4096), Arrived(0.0, 8192)]) == 0


def test_bytes_or_time_are_enough_whichever_comes_first():
    assert not enough([])
    assert not enough([Arrived(MOST_S / 2, MOST_BYTES // 2)])
    assert enough([Arrived(MOST_S / 2, MOST_BYTES)])
    assert enough([Arrived(MOST_S, 1)])
