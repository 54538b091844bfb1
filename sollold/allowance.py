"""Tokens per minute as a bucket. Pure: whoever asks brings the time.

It holds a minute's worth and fills evenly. What runs is charged as it goes and never cut, so the level can fall below
zero, by what the streams that were admitted before still say; nobody new is admitted until it is above zero again.
"""


class Allowance:
    """One key's bucket, full at first."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    @property
    def per_minute(self) -> int:
        return self._per_minute

    def limit(self, per_minute: int, now_s: float) -> None:
        """Go on with another limit; what was used stays used."""
        self._fill(now_s)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def wait_s(self, now_s: float) -> float:
        """Seconds until a request may be admitted; 0: now."""
        self._fill(now_s)
        missing = 1 - self._level
        return 0.0 if missing <= 0 else missing * 60 / self._per_minute

    def charge(self, tokens: int, now_s: float) -> None:
        """Take tokens out; negative: give some back."""
        self._fill(now_s)
        self._level = min(self._level - tokens, float(self._per_minute))

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._level = min(self._level + passed_s * self._per_minute / 60, float(self._per_minute))
        self._at_s = max(self._at_s, now_s)
