"""The benches run; what they measure is judged by people, on quiet machines."""

import json
import os
import subprocess
import sys

import pytest

from tests.bench.stack import ROOT


def bench(*arguments):
    command = [sys.executable, "-m", "tests.bench", *arguments, "--json"]
    found = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, timeout=90, check=False)
    assert found.returncode == 0, found.stderr.decode()[-2000:]
    return json.loads(found.stdout)


def test_the_relay_bench_measures_the_real_daemons_and_their_profile(tmp_path):
    [row] = bench("relay", "--streams", "3", "--seconds", "0.5", "--profile", str(tmp_path))["relay"]
    assert row["failed"] == 0
    assert row["tokens_per_s"] > 0
    assert row["added_p50_ms"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"agent.prof", "head.prof"}


@pytest.mark.engine
def test_the_tunnel_bench_makes_its_page(tmp_path):
    page = tmp_path / "tunnel.md"
    command = [sys.executable, "-m", "tests.bench.tunnel", "--mib", "4", "--rounds", "1", "--write", str(page)]
    made = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, timeout=90, check=False)
    assert made.returncode == 0, made.stderr.decode()[-2000:]
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| tunnel, TLS, forwarder")]
    assert float(rows[0][1]) > 0
    assert float(rows[0][2]) > 0


def test_the_decision_bench_decides_on_every_kind_of_cluster():
    rows = bench("decision", "--nodes", "3")["decision"]
    assert {row["nodes"] for row in rows} == {3}
