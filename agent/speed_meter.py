"""Reads a coordinator's speed off its own counters: which tokens count, and how long they took. Pure."""

from msgspec import Struct

MIN_TOKENS = 32
SETTLE_S = 2.0
# Counters are printed with six digits: what was added must be this part of them to be known within 2 %.
_LEAST_PART = 5e-4
_MOST_TOGETHER = 1.05
_TOKENS = b"llamacpp:tokens_predicted_total"
_SECONDS = b"llamacpp:tokens_predicted_seconds_total"
_DECODES = b"llamacpp:n_decode_total"
_TOGETHER = b"llamacpp:n_busy_slots_per_decode"


class Counters(Struct, frozen=True):
    """Of requests that have ended: tokens generated after the prompt, and the seconds that took.

    Of all there were: decodes, and the slots that took part in them. More slots than decodes: some ran together.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    decodes: float = 0.0
    slots: float = 0.0


class Sample(Struct, frozen=True):
    tokens: int
    ms_per_token: float


def counters_of(page: bytes) -> Counters | None:
    """Return what an engine's `/metrics` says; None when it does not say it."""
    found: dict[bytes, float] = {}
    for line in page.splitlines():
        name, _, text = line.partition(b" ")
        if name in (_TOKENS, _SECONDS, _DECODES, _TOGETHER):
            try:
                found[name] = float(text)
            except ValueError:
                return None
    if _TOKENS not in found or _SECONDS not in found:
        return None
    decodes = found.get(_DECODES, 0.0)
    return Counters(found[_TOKENS], found[_SECONDS], decodes, found.get(_TOGETHER, 1.0) * decodes)


class Meter:
    """One coordinator from the moment it is ready, looked at only while it generates for nobody.

    Tokens between two looks make a sample when one stream at a time made them, with nobody beside it, and not in the
    pool's first seconds. Too few wait for the next look.
    """

    def __init__(self, ready_s: float) -> None:
        self._settled_s = ready_s + SETTLE_S
        self._counted = Counters()
        self._clean = True

    def stream_opened(self, now_s: float) -> None:
        if now_s < self._settled_s:
            self._clean = False

    def disturbed(self) -> None:
        """Something else was computed at the same time: nothing up to the next look counts."""
        self._clean = False

    def look(self, counters: Counters) -> Sample | None:
        before = self._counted
        tokens, seconds = counters.tokens - before.tokens, counters.seconds - before.seconds
        # Streams that we do not carry, where the engine listens on a port of its own.
        alone = counters.slots - before.slots <= (counters.decodes - before.decodes) * _MOST_TOGETHER
        clean = self._clean and alone
        if clean and not _enough(tokens, seconds, counters):
            return None
        self._counted, self._clean = counters, True
        return Sample(round(tokens), 1000 * seconds / tokens) if clean else None


def _enough(tokens: float, seconds: float, counters: Counters) -> bool:
    least_tokens = max(MIN_TOKENS, counters.tokens * _LEAST_PART)
    return tokens >= least_tokens and seconds > 0 and seconds >= counters.seconds * _LEAST_PART
