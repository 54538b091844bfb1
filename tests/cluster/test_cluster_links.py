"""Links are measured between hosts, and decide which of them work together."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ask import TOKENS, Question
from tests.cluster.seed import HEAD, LARGE, Cluster, await_true, seed_cluster
from tests.tiny_model import PIECES

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root"), pytest.mark.timeout(240)]

MODEL = "recital"
SLOW, FAST = "192.168.1.21", "192.168.1.22"
SLOW_BITS_PER_S = 5_000_000
# With this KV cache a coordinator without layers takes 169 MB and a lender of them all 310: two nodes hold the model,
# the large one's engine and either of the others.
HEAD_FLAGS = ("--context-per-slot", "8192", "--parallel", "8", "--log-level", "debug")
CAPS = {LARGE: 230_000_000, SLOW: 480_000_000, FAST: 480_000_000}
MEASURED_WITHIN_S = 40.0
STARTS_WITHIN_S = 12.0  # what is not the moving: the command line, the engine's processes, three of them


@pytest.fixture
def directory(reciting_model: Path) -> Iterator[Path]:
    """With the model in it; a short path, for sockets have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="sc"))
    (path / "models").mkdir()
    os.link(reciting_model, path / "models" / f"{MODEL}.gguf")
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def started(directory: Path, engine: Path, prepare: Callable[[Cluster], None]) -> Iterator[Cluster]:
    with seed_cluster(
        directory, caps=CAPS, model_dir=directory / "models", engine=engine, head_flags=HEAD_FLAGS, prepare=prepare
    ) as cluster:
        yield cluster


def slow(cluster: Cluster) -> None:
    cluster.hosts[SLOW].slow_down(SLOW_BITS_PER_S)


def slow_and_apart(cluster: Cluster) -> None:
    slow(cluster)
    cluster.hosts[LARGE].drop_from(FAST)


def links(cluster: Cluster) -> dict[tuple[str, str], dict[str, Any]]:
    said = cluster.sollol("links", "--json")
    return {(each["from"], each["to"]): each for each in json.loads(said.stdout)["links"]}


def decision(cluster: Cluster) -> dict[str, Any]:
    return json.loads(cluster.sollol("place", MODEL, "--json").stdout)


def lenders(found: dict[str, Any]) -> set[str]:
    assert found["plan"], found["refusal"]
    return {share["node_id"] for share in found["plan"]["shares"] if share["node_id"]}


def say(cluster: Cluster) -> str:
    (answer,) = cluster.ask([Question(f"{HEAD}:7461", MODEL)])
    assert not answer.reason, answer.message
    return answer.text


def measured(cluster: Cluster, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Wait until they are. The daemons' logs tell first: a command costs half a second of CPU."""
    await_true(lambda: told(cluster) >= pairs, MEASURED_WITHIN_S, lambda: f"measured, not {told(cluster)}")
    await_true(lambda: links(cluster).keys() >= pairs, MEASURED_WITHIN_S, lambda: f"measured, not {links(cluster)}")
    return links(cluster)


def told(cluster: Cluster) -> set[tuple[str, str]]:
    """The links that the head has had measured, and those that an agent has found to lead nowhere."""
    found = set()
    for name in ("head", *CAPS):
        whole = (line for line in cluster.log_of(name).splitlines() if line.startswith("{") and line.endswith("}"))
        for line in map(json.loads, whole):
            if line["event"] == "link_measured" and not line["link"]["unreachable"]:
                found.add((line["node"], line["link"]["node_id"]))
            elif line["event"] == "peer_unreachable":
                found.add((f"node-{name.rpartition('.')[2]}", line["peer"]))
    return found


def test_the_node_behind_a_slow_link_is_left_out_for_the_one_behind_a_fast_link(directory, engine_binary):
    others = ("node-21", "node-22")
    with started(directory, engine_binary, slow) as cluster:
        found = measured(cluster, {*((one, "node-20") for one in others), *(("node-20", one) for one in others)})
        for pair, link in found.items():
            share = link["bytes_per_s"] * 8 / SLOW_BITS_PER_S
            assert 0 < link["rtt_s"] < 0.1
            assert 0.5 <= share <= 1.25 if "node-21" in pair else share > 20, (pair, link)

        placed = decision(cluster)
        assert (placed["coordinator"], lenders(placed)) == ("node-20", {"node-22"})
        (link,) = placed["links"]
        assert (link["node_id"], link["rtt_s"]) == ("node-22", found["node-20", "node-22"]["rtt_s"])
        assert say(cluster) == "".join(PIECES[:TOKENS])


def test_a_node_that_the_coordinator_cannot_reach_is_left_out_even_for_a_slow_one(directory, engine_binary):
    """The head reaches both. And loading over a slow link takes as long as the decision said."""
    with started(directory, engine_binary, slow_and_apart) as cluster:
        found = measured(cluster, {("node-20", "node-22"), ("node-20", "node-21")})
        assert found["node-20", "node-22"]["unreachable"]

        placed = decision(cluster)
        assert (placed["coordinator"], lenders(placed)) == ("node-20", {"node-21"})
        begun_s = time.monotonic()
        said = cluster.sollol("load", MODEL)
        took_s = time.monotonic() - begun_s
        assert said.returncode == 0, said.stderr
        assert placed["ready_s"] * 0.7 <= took_s <= placed["ready_s"] * 1.3 + STARTS_WITHIN_S, placed["ready_parts"]
