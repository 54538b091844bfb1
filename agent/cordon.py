"""Whether an operator keeps new pools away from this node: kept over restarts and boots, until they say otherwise."""

from pathlib import Path

import structlog
from msgspec import Struct
from sollol import kept

log = structlog.get_logger(__name__)

FILE_NAME = "cordon.json"
VERSION = 1


class _Said(Struct, frozen=True):
    cordoned: bool = False
    draining: bool = False


class Cordon:
    """Owner of the file, and of what it says.

    There is a file once somebody has cordoned this node. One that cannot be understood is taken for a cordon: a node
    that stays away by mistake is seen, one that comes back in the middle of a repair does harm.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        existed = self._path.exists()
        said = kept.load(self._path, _Said, version=VERSION)
        if said is None and existed:
            said = _Said(cordoned=True)
            log.warning("cordon_assumed", path=str(self._path), undo="sollol uncordon")
            kept.save(self._path, said, version=VERSION)
        self._said = said or _Said()

    @property
    def cordoned(self) -> bool:
        return self._said.cordoned

    @property
    def draining(self) -> bool:
        return self._said.draining

    def set(self, *, cordoned: bool, draining: bool) -> None:
        """Raises OSError when it cannot be kept: nothing has changed then."""
        said = _Said(cordoned or draining, draining)
        if said != self._said:
            kept.save(self._path, said, version=VERSION)
            self._said = said
            log.info("cordon_set", cordoned=said.cordoned, draining=said.draining)
