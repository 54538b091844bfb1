import pytest

from tests.fakes.fake_head import fake_head
from tests.sollol_command import sollol


@pytest.fixture
async def head():
    async with fake_head() as running:
        yield running


@pytest.mark.parametrize("command", ["cordon", "uncordon"])
async def test_an_operator_keeps_pools_away_from_a_node_and_lets_them_back(head, command):
    servicer, address = head
    status, out, err = await sollol("--head", address, command, "small")
    assert (status, out) == (0, "")
    assert err.startswith("small takes")
    assert servicer.asked == [(command, "small")]


async def test_drain_ends_when_the_node_is_empty(head):
    status, out, err = await sollol("--head", head[1], "drain", "small")
    assert (status, out) == (0, "")
    assert "small is empty" in err


async def test_drain_says_what_is_left_when_time_is_up(head):
    status, out, err = await sollol("--head", head[1], "drain", "stuck", "--timeout", "1")
    assert (status, out) == (3, "")
    assert "stuck is not empty after 1 s, and goes on draining: left: tiny-0 on big (1 streams)" in err
