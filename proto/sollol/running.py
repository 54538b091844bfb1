"""What runs for peers, or with them, and ends at once when their certificates stop counting."""

from collections.abc import Callable

from sollol.certificates import Certificate
from sollol.errors import Refusal, SollolError
from sollol.identity import Identity
from sollol.material import Material, admitted

End = Callable[[Refusal], None]


class Running:
    """Owner of the calls and connections that a revocation ends. For one thread.

    Expiry ends none of them: whoever renews in time shall not lose the streams that began before.
    """

    def __init__(self) -> None:
        self._ends: dict[object, tuple[Certificate, End]] = {}

    def add(self, peer: Certificate, end: End) -> Callable[[], None]:
        """Have `end` called, once at most, with why the peer counts no more; returns what to call when it is over."""
        key = object()
        self._ends[key] = (peer, end)
        return lambda: self._ends.pop(key, None) and None

    def take(self, material: Material) -> list[tuple[Identity | None, Refusal, End]]:
        """What may not go on by the newest files: whose it is, why, and how to end it. Each is returned once."""
        found = []
        for key, (peer, end) in tuple(self._ends.items()):
            try:
                admitted(peer, material, now_s=peer.not_before_s)
            except SollolError as error:
                self._ends.pop(key, None)
                found.append((peer.identity, error.refusal, end))
        return found
