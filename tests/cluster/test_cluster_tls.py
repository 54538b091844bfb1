"""The seed's cluster with certificates: no port of it answers whoever has none, and it works all the same."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ask import TOKENS, Question
from tests.cluster.seed import ADDRESSES, HEAD, Cluster, await_true, seed_cluster
from tests.tiny_model import PIECES

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root"), pytest.mark.timeout(240)]

MODEL = "recital"
CAPS = dict(zip(ADDRESSES, (100_000_000, 480_000_000, 480_000_000, 480_000_000), strict=True))


@pytest.fixture
def cluster(reciting_model: Path, engine_binary: Path) -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="sc"))
    (directory / "models").mkdir()
    os.link(reciting_model, directory / "models" / f"{MODEL}.gguf")
    try:
        with seed_cluster(
            directory, caps=CAPS, model_dir=directory / "models", engine=engine_binary, tls=True
        ) as started:
            yield started
    finally:
        shutil.rmtree(directory)


def test_hosts_with_certificates_serve_a_model_and_strangers_nothing(cluster: Cluster) -> None:
    (answer,) = cluster.ask([Question(head=f"{HEAD}:7461", model=MODEL)])
    assert (answer.reason, answer.text) == ("", "".join(PIECES[:TOKENS])), answer
    await_true(lambda: cluster.sollol("links").returncode == 0, 60, "sollol links answers")

    stranger = Cluster(cluster.hosts, cluster.directory)
    for command in (("nodes",), ("pools",), ("unload", MODEL)):
        done = stranger.sollol(*command)
        assert done.returncode == 5, done.stderr
        assert "NO_CERTIFICATE" in done.stderr
    assert "WRONG_VERSION_NUMBER" in cluster.log_of("head")
    assert len(cluster.nodes()) == len(CAPS)
