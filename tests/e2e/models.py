"""The models of the end-to-end tests, by name: copies of two tiny ones, since links to one file would be one model."""

import shutil
from pathlib import Path

RECITER, RANDOM, COLD, LOADED, BROKEN = "tiny-reciter", "tiny-random", "cold-reciter", "loaded-reciter", "truncated"
# Each of these loses its engine in one test: no test waits for another's back-off.
KILLED = ("killed-http", "killed-grpc", "killed-early")
DIES_AT_START, KILLED_LOADING = "dies-at-start", "killed-loading"


def write_all(directory: Path, reciting: Path, random: Path) -> None:
    for name in (RECITER, COLD, LOADED, *KILLED, DIES_AT_START, KILLED_LOADING):
        shutil.copy(reciting, directory / f"{name}.gguf")
    shutil.copy(random, directory / f"{RANDOM}.gguf")
    whole = reciting.read_bytes()
    (directory / f"{BROKEN}.gguf").write_bytes(whole[: len(whole) // 2])
