"""Two heads and a hundred cold loads on a cluster with room for a few: no byte is promised twice, and losers hear why."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ask import TOKENS, Answer, Question
from tests.cluster.journal import Change, journal_of, promised
from tests.cluster.seed import ADDRESSES, HEAD, LARGE, UP_WITHIN_S, Cluster, await_true, seed_cluster
from tests.tiny_model import PIECES

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root")]

MODELS = tuple(f"recital-{number:02}" for number in range(50))
SECOND_HEAD = "192.168.1.21"
HEADS = (f"{HEAD}:7461", f"{SECOND_HEAD}:7461")
# With this KV cache a whole model takes 282 MB, a coordinator without layers 169 MB, and each layer 17 MB on top of
# 171 MB where it is lent. So the first cluster holds a few models, in one piece and in two, and the second one holds a
# single model that needs all of its nodes.
HEAD_FLAGS = ("--context-per-slot", "8192", "--parallel", "8")
ROOMY_CAP, TIGHT_CAP = 480_000_000, 230_000_000


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: sockets have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="sc"))
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("cap", "nodes"), [(ROOMY_CAP, {1, 2}), (TIGHT_CAP, {4})], ids=["room for a few", "for one"])
def test_racing_heads_never_promise_a_byte_twice(directory, reciting_model, engine_binary, cap, nodes):
    models = directory / "models"
    models.mkdir()
    for name in MODELS:
        os.link(reciting_model, models / f"{name}.gguf")
    with seed_cluster(
        directory,
        caps=dict.fromkeys(ADDRESSES, cap),
        model_dir=models,
        engine=engine_binary,
        head_flags=HEAD_FLAGS,
        agent_flags=("--log-level", "debug"),
        model_hosts=(LARGE, "192.168.1.22"),
    ) as cluster:
        start_second_head(cluster)

        answers = cluster.ask([Question(head, model) for model in MODELS for head in HEADS])

        winners = [answer for answer in answers if not answer.reason]
        assert winners, "somebody always wins a race for room that is there"
        assert {answer.text for answer in winners} == {"".join(PIECES[:TOKENS])}
        check_losers([answer for answer in answers if answer.reason])
        # More than one head may have won the same model, by starting it or by joining the other's.
        assert spans(journal(cluster)) <= nodes
        unload_all(cluster, {answer.model for answer in winners})

        changes = journal(cluster)
        most = [max(sums.values(), default=0) for sums in promised(changes)]
        assert max(most) <= cap
        assert list(promised(changes))[-1] == {}


def start_second_head(cluster: Cluster) -> None:
    cluster.start_head(*HEAD_FLAGS, host=SECOND_HEAD, name="head2")
    await_true(
        lambda: cluster.log_of("head2").count('"node_connected"') >= len(ADDRESSES),
        UP_WITHIN_S,
        "the second head sees all",
    )


def check_losers(losers: list[Answer]) -> None:
    assert losers
    for loser in losers:
        assert loser.reason in {"NO_FIT", "MEMORY_SHORT"}, loser
        assert loser.numbers["needed_bytes"] > 0, loser
        assert "free_bytes" in loser.numbers or "free_together_bytes" in loser.numbers, loser
        assert not loser.text


def journal(cluster: Cluster) -> list[Change]:
    return journal_of({address: cluster.log_of(address) for address in ADDRESSES})


def spans(changes: list[Change]) -> set[int]:
    """Over how many nodes each pool was started that was started at all."""
    hosts: dict[str, set[str]] = {}
    for change in changes:
        if change.what == "bound":
            hosts.setdefault(change.pool_id, set()).add(change.host)
    return {len(found) for found in hosts.values()}


def unload_all(cluster: Cluster, models: set[str]) -> None:
    for model in sorted(models):
        done = cluster.sollol("unload", model)
        assert done.returncode == 0, done.stderr
    cluster.nothing_left()
