"""A head's memory of where agents were."""

import asyncio
import contextlib
from types import SimpleNamespace

import msgspec
import pytest
from sollol import kept
from structlog.testing import capture_logs

from sollold import remembered
from sollold.remembered import Remembered
from tests.placement_cases import node
from tests.waiting import wait_until


class Watched:
    def __init__(self, **addresses):
        self.where = addresses
        self.connected = True

    def status(self, node_id):
        return msgspec.structs.replace(node(node_id), connected=self.connected) if node_id in self.where else None

    def link(self, node_id):
        return SimpleNamespace(address=self.where[node_id])


@contextlib.asynccontextmanager
async def running(memory):
    task = asyncio.create_task(memory.run())
    yield
    task.cancel()
    await asyncio.wait({task})


async def written(path, agents):
    def same():
        found = kept.load(path, dict[str, remembered._Agent], version=remembered.VERSION)
        return found is not None and {name: each.address for name, each in found.items()} == agents

    await wait_until(same, what="it is written down")


async def test_the_next_head_knows_where_agents_were_and_where_they_moved(tmp_path):
    path = tmp_path / "not there yet" / "agents.json"
    memory, nodes = Remembered(path), Watched(a="h1:1", b="h2:1")
    async with running(memory):
        memory.heard(nodes, "a")
        memory.heard(nodes, "b")
        await written(path, {"a": "h1:1", "b": "h2:1"})
        nodes.where["a"] = "h3:1"
        memory.heard(nodes, "a")
        await written(path, {"a": "h3:1", "b": "h2:1"})
    assert set(Remembered(path).addresses()) == {"h3:1", "h2:1"}
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_report_that_says_nothing_new_writes_nothing_and_neither_does_a_loss(tmp_path):
    now = [1000.0]
    memory, nodes = Remembered(tmp_path / "f", wall_clock=lambda: now[0]), Watched(a="h1:1")
    memory.heard(nodes, "a")
    memory._news.clear()
    memory.heard(nodes, "a")
    memory.heard(nodes, "unknown")
    nodes.connected = False
    now[0] += 4000
    memory.heard(nodes, "a")
    assert not memory._news.is_set()
    nodes.connected = True
    memory.heard(nodes, "a")
    assert memory._news.is_set(), "that it is still there is worth a word now and then"


async def test_the_memory_is_bounded_and_forgets_the_longest_unheard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    memory, nodes = Remembered(tmp_path / "f"), Watched(**{f"n{at}": f"h:{at}" for at in range(5)})
    for name in nodes.where:
        memory.heard(nodes, name)
    assert memory.addresses() == ("h:2", "h:3", "h:4")


async def test_an_agent_unheard_of_for_a_week_is_not_tried(tmp_path):
    agents = {"old": remembered._Agent("h:1", 0.0), "new": remembered._Agent("h:2", 604_000.0)}
    kept.save(tmp_path / "f", agents, version=remembered.VERSION)
    assert Remembered(tmp_path / "f", wall_clock=lambda: 604_801.0).addresses() == ("h:2",)


@pytest.mark.parametrize("damaged", [b"", b"nonsense", b'{"version": 9, "content": {}}'])
async def test_a_damaged_memory_is_set_aside_and_the_head_starts(tmp_path, damaged):
    (tmp_path / "f").write_bytes(damaged)
    assert Remembered(tmp_path / "f").addresses() == ()
    (aside,) = tmp_path.glob("f.bad-*")
    assert aside.read_bytes() == damaged


async def test_a_memory_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "file").touch()
    memory = Remembered(tmp_path / "file" / "agents.json")
    with capture_logs() as lines:
        async with running(memory):
            memory.heard(Watched(a="h:1"), "a")
            told = "agents_not_remembered"
            await wait_until(lambda: told in [line["event"] for line in lines], what="it is told")
            assert memory.addresses() == ("h:1",)
