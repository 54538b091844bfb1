"""Warnings that a rescan every half minute would repeat for ever: each told once for each path and problem."""

from functools import lru_cache
from pathlib import Path

import structlog

MOST_KNOWN = 4096  # a flood of others makes the oldest be told again

log = structlog.get_logger(__name__)


@lru_cache(maxsize=MOST_KNOWN)
def warn_once(event: str, path: Path, problem: str) -> None:
    log.warning(event, path=str(path), problem=problem)
