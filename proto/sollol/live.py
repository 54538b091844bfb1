"""A daemon's settings while it runs: a reload replaces those that can change live, and says which need a restart."""

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


class Live(Generic[T]):
    """Owner of the settings as they are in force.

    Args:
        reread: Reads every source again; raises ConfigError.
        changeable: The settings that a reload may change; those who need them say so by `subscribe`.
    """

    def __init__(self, settings: T, *, reread: Callable[[], T], changeable: frozenset[str]) -> None:
        self.now = settings
        self._reread = reread
        self._changeable = changeable
        self._listeners: list[Callable[[T], None]] = []

    def subscribe(self, listener: Callable[[T], None]) -> None:
        """Call it with the new settings after each reload that changed any."""
        self._listeners.append(listener)

    def reload(self) -> None:
        """Read again, put in force what can be, log the names of the rest.

        Raises:
            ConfigError: something is wrong with the new settings; those in force stay.
        """
        read = self._reread()
        differ = [name for name in read.__struct_fields__ if getattr(read, name) != getattr(self.now, name)]
        changed = {name: getattr(read, name) for name in differ if name in self._changeable}
        later = [name for name in differ if name not in self._changeable]
        if changed:
            self.now = replace(self.now, **changed)
            for listener in self._listeners:
                listener(self.now)
        log.info("settings_reloaded", changed=list(changed))
        if later:
            log.warning("settings_need_restart", settings=later)
