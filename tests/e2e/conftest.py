"""The clusters of the end-to-end tests. The shared ones are not disturbed: a test that breaks one starts its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import models
from tests.e2e.daemons import ByHand, Up, short_home
from tests.fakes.fake_engine import fake_engine


@pytest.fixture(scope="session")
def models_dir(reciting_model: Path, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model of `tests.e2e.models`."""
    directory = tmp_path_factory.mktemp("e2e-models")
    models.write_all(directory, reciting_model, random_model)
    return directory


@pytest.fixture(scope="session")
def cluster(models_dir: Path, engine_binary: Path, ports: Callable[[], int]) -> Iterator[Up]:
    """`sollol up` with two agents and the real engine."""
    with short_home() as home:
        up = Up(home, ports, models=models_dir, engine=engine_binary, agents=2)
        try:
            up.wait_ready()
            yield up
        finally:
            up.close()
        assert up.process.returncode == 0, up.errors


@pytest.fixture(scope="session")
def faulty_engine(engine_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real engine behind a script that lets the start of some models go wrong."""
    directory = tmp_path_factory.mktemp("faulty-engine")
    script = directory / "llama-server"
    fake = " ".join(fake_engine("die=boom:_the_test_says_so", "exit=3"))
    cases = [f'*/{models.DIES_AT_START}.gguf*) exec {fake} "$@";;']
    for name in models.KILLED_LOADING:
        once = directory / f"{name}.started"
        cases.append(f"*/{name}.gguf*) [ -e {once} ] || {{ : >{once}; exec sleep 600; }};;")
    script.write_text(f'#!/bin/sh\ncase "$*" in\n{chr(10).join(cases)}\nesac\nexec {engine_binary} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="session")
def faulty(models_dir: Path, faulty_engine: Path, ports: Callable[[], int]) -> Iterator[Up]:
    """`sollol up` with two agents, whose engine fails to start as `faulty_engine` says."""
    with short_home() as home:
        up = Up(home, ports, models=models_dir, engine=faulty_engine, agents=2)
        try:
            up.wait_ready()
            yield up
        finally:
            up.close()
        assert up.process.returncode == 0, up.errors


@pytest.fixture
def start_up(models_dir: Path, ports: Callable[[], int]) -> Iterator[Callable[..., Up]]:
    """Start a `sollol up` of the test's own and wait until it is ready."""
    with short_home() as home:
        started: list[Up] = []

        def start(engine: Path, agents: int = 1, **more: Any) -> Up:
            below = home / str(len(started))
            below.mkdir()
            started.append(Up(below, ports, models=models_dir, engine=engine, agents=agents, **more))
            started[-1].wait_ready()
            return started[-1]

        yield start
        for up in started:
            up.close()


@pytest.fixture
def by_hand(models_dir: Path, engine_binary: Path, ports: Callable[[], int]) -> Iterator[ByHand]:
    """A cluster with its Redis and no daemon yet."""
    with short_home() as home:
        found = ByHand(home, ports, models=models_dir, engine=engine_binary)
        try:
            found.start_redis()
            yield found
        finally:
            found.close()
