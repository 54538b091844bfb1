"""The memory that engines log is shown beside the prediction, and the next placement of the model counts with it."""

import json
import shlex
from pathlib import Path

import pytest
from sollol.correction import UNCORRECTED
from sollol.report import PlacementWish

from tests.e2e.models import COLD, RECITER
from tests.fakes.fake_engine import fake_engine
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
MIB = 1024**2


async def compared(cluster, model):
    """The pool of the model once the bytes that its engine logged are reported."""

    async def shown():
        pool = await cluster.ready_pool(model)
        return pool if pool.instance.shares[0].logged_bytes is not None else None

    return await wait_until(shown, what="logged bytes are reported")


async def known(cluster):
    async with cluster.client() as client:
        return [record for status in await client.nodes() for record in status.report.memory]


async def test_the_real_engines_figures_are_those_of_the_prediction_and_nothing_is_corrected(cluster):
    await cluster.say(RECITER)
    pool = await compared(cluster, RECITER)

    (share,) = pool.instance.shares
    assert share.logged_bytes == pytest.approx(share.total_bytes - share.margin_bytes, rel=0.01)
    records = await known(cluster)
    assert records
    assert {record.correction for record in records} == {UNCORRECTED}
    _, pools, _ = await cluster.cli("pools")
    assert "predicted, " in pools
    assert " logged)" in pools
    _, text, _ = await cluster.cli("place", RECITER)
    assert "corrected" not in text


@pytest.fixture
def greedy(tmp_path: Path, engine_binary: Path) -> tuple[Path, Path]:
    """The real engine, except for one model, whose engine logs what the second path says."""
    script, says = tmp_path / "llama-server", tmp_path / "says"
    fake = shlex.join(fake_engine())
    script.write_text(
        f'#!/bin/sh\ncase "$*" in */{COLD}.gguf*) exec {fake} --fake "$(cat {says})" "$@";; esac\n'
        f'exec {engine_binary} "$@"\n'
    )
    script.chmod(0o755)
    return script, says


async def test_an_engine_that_logs_a_fifth_more_gets_a_fifth_more_the_next_time(start_up, greedy: tuple[Path, Path]):
    script, says = greedy
    cluster = start_up(script)
    (before,) = await shares(cluster)
    sizes = {"model": before["weight_bytes"], "KV": before["kv_bytes"], "compute": before["compute_bytes"]}
    lines = [f"CPU_{kind}_buffer_size_=_{1.2 * size / MIB:.2f}_MiB" for kind, size in sizes.items()]
    says.write_text("says=loading_model_tensors;" + ";".join(lines))

    async with cluster.client() as client:
        await client.load(PlacementWish(model=COLD))
        (share,) = (await compared(cluster, COLD)).instance.shares
        assert share.logged_bytes == pytest.approx(1.2 * sum(sizes.values()), rel=0.01)
        await client.unload(COLD)
    (after,) = await shares(cluster)

    logged = share.logged_bytes
    assert after["total_bytes"] - after["margin_bytes"] >= logged - MIB // 20
    assert after["total_bytes"] >= logged + before["margin_bytes"]
    _, text, _ = await cluster.cli("place", COLD)
    assert "Memory corrected by what earlier loads logged: weights x 1.2" in text
    _, other, _ = await cluster.cli("place", RECITER)
    assert "Memory corrected" not in other


async def shares(cluster):
    status, out, err = await cluster.cli("place", COLD, "--json")
    assert status == 0, err
    return json.loads(out)["plan"]["shares"]
