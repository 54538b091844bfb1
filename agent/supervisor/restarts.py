"""How long a model that keeps dying must wait for its next start. Pure: times are any monotonic clock's seconds."""

from msgspec import Struct
from sollol.errors import Reason, refuse

# Not the model's doing: whatever starts next is as likely to meet with it.
NO_DEATH = frozenset({Reason.PORT_TAKEN, Reason.CERTIFICATE_UNREADABLE})


class RestartPolicy(Struct, frozen=True, kw_only=True):
    """`deaths` unexpected exits within `window_s` cost a wait of `first_wait_s`, doubled at each further one."""

    deaths: int = 3
    window_s: float = 60.0
    first_wait_s: float = 5.0
    longest_wait_s: float = 60.0


class History(Struct, frozen=True):
    """The unexpected exits of one model that still count, and the wait that the newest one cost."""

    deaths: tuple[float, ...] = ()
    wait_s: float = 0.0


def after_death(history: History, policy: RestartPolicy, *, now_s: float) -> History:
    # A wait keeps the deaths apart, so it lengthens the window: else a long wait would make the model look healthy.
    window_s = policy.window_s + (policy.deaths - 1) * history.wait_s
    recent = (*(death for death in history.deaths if now_s - death < window_s), now_s)
    if len(recent) < policy.deaths:
        return History(recent)
    wait_s = min(2 * history.wait_s or policy.first_wait_s, policy.longest_wait_s)
    return History(recent[-policy.deaths :], wait_s)


def retry_after_s(history: History, *, now_s: float) -> float:
    """Return the seconds until a start is allowed; 0 means go on."""
    if not history.wait_s:
        return 0.0
    return max(0.0, history.deaths[-1] + history.wait_s - now_s)


class Deaths:
    """Owner of what is known of each model's unexpected exits here."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._histories: dict[str, History] = {}

    def check(self, model: str, *, now_s: float) -> None:
        """Accept a start of this model.

        Raises:
            SollolError: BACKING_OFF.
        """
        wait_s = retry_after_s(self._histories.get(model, History()), now_s=now_s)
        if wait_s > 0:
            message = f"{model} died {self._policy.deaths} times in short order here; see the log of its last start"
            raise refuse(Reason.BACKING_OFF, message, retryable=True, retry_after_s=wait_s)

    def add(self, model: str, *, now_s: float) -> float:
        """Take in one more; returns the seconds until its next start is allowed."""
        history = after_death(self._histories.get(model, History()), self._policy, now_s=now_s)
        self._histories[model] = history
        return retry_after_s(history, now_s=now_s)
