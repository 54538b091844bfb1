"""While a model loads over several nodes, who waits sees how much of it has arrived where."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.seed import ADDRESSES, HEAD, LARGE, Cluster, seed_cluster
from tests.many_architectures import ARCHITECTURES, write_model

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root")]

# 50 MB of weights; a node has room for some 30 MB of them beside the margin and the buffers.
CAP_BYTES = 190_000_000
MODEL = "wide"
BITS_PER_S = 80_000_000
LOAD = """
import asyncio, sys, msgspec
from sollol.client import Client
from sollol.report import PlacementWish

async def main():
    async with Client(sys.argv[1]) as client:
        wish = PlacementWish(model=sys.argv[2], context_per_slot=512, parallel=1)
        told = lambda progress: print(msgspec.json.encode(progress).decode(), flush=True)
        await client.load(wish, told)

asyncio.run(main())
"""


@pytest.fixture
def cluster(engine_binary: Path) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="sollol-progress-") as home:
        models = Path(home, "models")
        models.mkdir()
        write_model(models / f"{MODEL}.gguf", ARCHITECTURES["llama"])
        caps = dict.fromkeys(ADDRESSES[1:], CAP_BYTES)
        with seed_cluster(Path(home), caps=caps, model_dir=models, engine=engine_binary) as cluster:
            for address in ADDRESSES[2:]:
                cluster.hosts[address].slow_down(BITS_PER_S)
            yield cluster


def test_the_percent_of_a_load_over_slow_links_is_of_bytes_with_each_nodes_own(cluster: Cluster) -> None:
    loaded = cluster.hosts[HEAD].run(sys.executable, "-c", LOAD, f"{HEAD}:7461", MODEL)
    assert loaded.returncode == 0, loaded.stderr
    told: list[dict[str, Any]] = [json.loads(line) for line in loaded.stdout.splitlines()]

    loading = [each for each in told if each["state"] == "loading"]
    print(*(f"{each['percent']:.0f} % {each['nodes']}" for each in loading), sep="\n")
    percents = [each["percent"] for each in loading]
    assert percents == sorted(percents)
    assert len({percent for percent in percents if 0 < percent < 99}) >= 3
    nodes = {node["node_id"] for each in loading for node in each["nodes"]}
    assert nodes & {"node-21", "node-22"}
    for name in nodes - {f"node-{LARGE.rsplit('.', 1)[1]}"}:
        own = [node["percent"] for each in loading for node in each["nodes"] if node["node_id"] == name]
        assert own == sorted(own)
        assert any(0 < percent < 100 for percent in own), own
    assert cluster.sollol("unload", MODEL).returncode == 0
