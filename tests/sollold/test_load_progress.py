"""The percent of a load over several nodes: by bytes, wherever they go, with each node's own."""

import asyncio

import pytest
from msgspec.structs import replace
from sollol.inference import NodeProgress, Progress
from sollol.report import DeviceShare, Instance, InstanceKind, InstanceState

from sollold import load_progress
from sollold.cli.generate import progress_text
from sollold.front.opening import ProgressBoard
from sollold.load_progress import LoadProgress, progress_of
from tests.placement_cases import node
from tests.waiting import wait_until

POOL = "pool-1"
STARTING = Instance(
    instance_id=POOL,
    pool_id=POOL,
    model="m",
    state=InstanceState.STARTING,
    percent=50.0,
    shares=(
        DeviceShare(device_id="CPU", layers=0, weight_bytes=100),
        DeviceShare(device_id="CUDA0", layers=2, weight_bytes=300),
        DeviceShare(device_id="CPU", layers=3, weight_bytes=400, node_id="b"),
        DeviceShare(device_id="CUDA0", layers=3, weight_bytes=200, node_id="b"),
        DeviceShare(device_id="CPU", layers=3, weight_bytes=1000, node_id="a"),
    ),
)


def lends(percent: float, pool: str = POOL) -> Instance:
    return Instance(
        instance_id=f"{pool}.backend",
        pool_id=pool,
        model="",
        state=InstanceState.READY,
        kind=InstanceKind.BACKEND,
        percent=percent,
    )


class Cluster:
    """What a head knows of the nodes; a coordinator starts on `a`, which lends its CPU too."""

    def __init__(self, **percents: float) -> None:
        self.percents = percents

    def status(self, node_id: str):
        if node_id not in self.percents:
            return None
        return node(node_id, instances=(lends(99, "another"), STARTING, lends(self.percents[node_id])))


def test_every_byte_counts_where_it_goes():
    progress = progress_of(STARTING, "a", Cluster(a=10.0, b=80.0).status)

    assert progress.percent == (400 * 50 + 600 * 80 + 1000 * 10) / 2000
    assert (progress.state, progress.node_id) == ("loading", "a")
    assert progress.nodes == (NodeProgress(node_id="b", percent=80.0), NodeProgress(node_id="a", percent=10.0))


def test_a_node_that_has_not_reported_its_backend_yet_has_got_nothing_yet():
    assert progress_of(STARTING, "a", Cluster(b=100.0).status).nodes[1].percent == 0.0


def test_it_is_not_done_before_the_engine_serves():
    assert progress_of(replace(STARTING, percent=99.0), "a", Cluster(a=100.0, b=100.0).status).percent == 99.0


@pytest.mark.parametrize("shares", [(), STARTING.shares[:2], (DeviceShare(device_id="CPU", layers=9, node_id="b"),)])
def test_on_one_node_and_without_known_bytes_it_is_the_engines_own(shares):
    alone = replace(STARTING, shares=shares)

    assert progress_of(alone, "a", Cluster().status) == Progress(state="loading", percent=50.0, node_id="a")


async def test_it_is_told_with_the_coordinators_news_and_when_only_a_backend_gets_on(monkeypatch):
    monkeypatch.setattr(load_progress, "EVERY_S", 0.01)
    cluster, told = Cluster(a=0.0, b=0.0), []
    progress = LoadProgress("a", cluster.status, told.append)
    telling = asyncio.create_task(progress.keep_telling())
    await asyncio.sleep(0.03)
    assert told == []
    progress.heard(STARTING)
    progress.heard(STARTING)
    assert len(told) == 1

    cluster.percents["b"] = 30.0
    await wait_until(lambda: len(told) == 2, what="the backend's bytes are told")
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)

    assert told[1].nodes[0].percent == 30.0
    assert told[1].percent > told[0].percent


def test_people_read_it_on_the_command_line_and_in_a_waiting_stream():
    progress = replace(progress_of(STARTING, "a", Cluster(a=10.4, b=80.0).status), percent=43.2)
    board = ProgressBoard()
    board.note(progress)

    assert progress_text(progress) == "loading on a 43 % (b 80 %, a 10 %)"
    assert board.text() == "loading 43% on a (b 80%, a 10%)"
