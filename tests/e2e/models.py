"""The models of the end-to-end tests, by name: copies of two tiny ones, since links to one file would be one model."""

import shutil
from pathlib import Path

from tests.slow_model import write_slow_reciting_model

RECITER, RANDOM, COLD, LOADED, BROKEN = "tiny-reciter", "tiny-random", "cold-reciter", "loaded-reciter", "truncated"
# Each of these loses its engine in one test: no test waits for another's back-off. The first three speak at length.
KILLED_HTTP, KILLED_GRPC, FROZEN, KILLED_EARLY = "killed-http", "killed-grpc", "frozen", "killed-early"
DIES_AT_START = "dies-at-start"
# Their first start sleeps, until it is killed.
KILLED_LOADING = ("sleeper-anywhere", "sleeper-pinned")
# Says a token every 20 ms or so: whoever reads it sees each one come.
SLOW = "slow-reciter"


def write_all(directory: Path, reciting: Path, random: Path) -> None:
    for name in (RECITER, COLD, LOADED, KILLED_EARLY, *KILLED_LOADING, DIES_AT_START):
        shutil.copy(reciting, directory / f"{name}.gguf")
    for name in (RANDOM, KILLED_HTTP, KILLED_GRPC, FROZEN):
        shutil.copy(random, directory / f"{name}.gguf")
    write_slow_reciting_model(directory / f"{SLOW}.gguf")
    whole = reciting.read_bytes()
    (directory / f"{BROKEN}.gguf").write_bytes(whole[: len(whole) // 2])
