"""Keys in memory, and an admission over them, for tests of what stands behind it."""

from typing import Any

from sollold.admission import Admission
from sollold.keys import Key, digest


class FakeKeys:
    """A source of keys whose content the test changes; an error in place of keys is raised."""

    def __init__(self, *keys: Key) -> None:
        self.keys: tuple[Key, ...] | Exception = keys

    def current(self) -> tuple[Key, ...]:
        if isinstance(self.keys, Exception):
            raise self.keys
        return self.keys


def key_of(name: str, **limits: object) -> Key:
    """The key whose token is `token_of(name)`."""
    return Key(name=name, sha256=digest(token_of(name)), created_unix_s=0.0, **limits)  # type: ignore[arg-type]


def token_of(name: str) -> str:
    return f"sk-sollol-{name}"


def admission_of(*keys: Key, mode: str = "auto", known: dict[str, str] | None = None, **clocks: Any) -> Admission:
    return Admission(FakeKeys(*keys), mode=mode, known=(known or {}).get, **clocks)


OPEN = admission_of()
