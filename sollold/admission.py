"""Who may ask for what, and how much at a time: one gate for HTTP, gRPC and MQTT.

    permit = admission.admit(token, model)
    async with opened(dispatcher, request, board, permit, account) as opening: ...

Limits are each head's own: heads do not know of each other's requests.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import structlog
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import AvailableModel

from sollold.allowance import Allowance
from sollold.keys import Key, Standing, matching

log = structlog.get_logger(__name__)

# Nobody knows when one of a key's own requests ends.
CONCURRENCY_RETRY_AFTER_S = 1.0
# Bytes of a request to a token of its prompt, until the engine has said how many there are.
BYTES_PER_TOKEN = 4
HTTP_HEADERS = "`Authorization: Bearer KEY` or `X-Api-Key: KEY`"
# One answer for both, so that nobody learns which keys there were.
_NOT_VALID = "this API key is not valid here: `sollol keys list` on the head's machine shows those that are"


class KeySource(Protocol):
    def current(self) -> tuple[Key, ...]:
        """Raises SollolError: KEYS_UNREADABLE."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the owner of a key, or somebody who needs none. `name` is for logs and for turns in a queue."""

    name: str = ""
    key: Key | None = None

    def may_use(self, model: str) -> bool:
        """Whether it may ask for this model, a canonical name."""
        return self.key is None or self.key.covers(model)


ANYBODY = Caller()


class _Use:
    """What one key uses now."""

    def __init__(self) -> None:
        self.running = 0
        self.allowance: Allowance | None = None

    def metered(self, key: Key, now_s: float) -> Allowance | None:
        """The bucket of a limited key, under the limit that it has now."""
        if key.tokens_per_minute is None:
            self.allowance = None
        elif self.allowance is None:
            self.allowance = Allowance(key.tokens_per_minute, now_s)
        elif self.allowance.per_minute != key.tokens_per_minute:
            self.allowance.limit(key.tokens_per_minute, now_s)
        return self.allowance


class Permit:
    """One request that was admitted; counts until it is released. `release` may be called more than once."""

    def __init__(self, caller: Caller, use: _Use, allowance: Allowance | None, clock: Callable[[], float]) -> None:
        self.asker = caller.name
        self._use = use
        self._allowance = allowance
        self._clock = clock
        self._released = False
        use.running += 1

    def charge(self, tokens: int) -> None:
        """Take tokens from what the key may still use; negative: give some back."""
        if self._allowance is not None:
            self._allowance.charge(tokens, self._clock())

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._use.running -= 1


class Admission:
    """Owner of the counts of every key.

    Args:
        keys: The keys as they are now.
        mode: "always" needs a key for everything, "never" asks for none, "auto" asks once there is one.
        known: The model's own name for a name or alias; None for one that nobody has. It may raise NO_NODES, while that
            cannot be told: whose key is for a name is not refused under an alias of it.
        refused: Told why each request was refused that was refused for its key.
        clock: Seconds that only grow, for limits.
        wall: Unix time, for keys that expire.
    """

    def __init__(
        self,
        keys: KeySource,
        *,
        mode: str,
        known: Callable[[str], str | None],
        refused: Callable[[Reason], None] = lambda _reason: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._mode, self._known, self._refused = keys, mode, known, refused
        self._clock, self._wall = clock, wall
        self._uses: dict[str, _Use] = {}

    def authenticate(self, token: str | None, *, sent_as: str = HTTP_HEADERS) -> Caller:
        """Who sent this token (None: none was sent); `sent_as` says how the front takes them, for who sent none.

        Raises:
            SollolError: KEY_MISSING, KEY_INVALID, KEY_EXPIRED or KEYS_UNREADABLE.
        """
        if self._mode == "never":
            return ANYBODY
        keys = self._keys.current()
        if self._mode == "auto" and not keys:
            return ANYBODY
        if not token:
            raise self._refusal(Reason.KEY_MISSING, f"no API key: send one as {sent_as}")
        key = matching(keys, token)
        if key is None:
            self._refuse("", "unknown", Reason.KEY_INVALID, _NOT_VALID)
        match key.standing(self._wall()):
            case Standing.REVOKED:
                self._refuse(key.name, "revoked", Reason.KEY_INVALID, _NOT_VALID)
            case Standing.EXPIRED:
                self._refuse(key.name, "expired", Reason.KEY_EXPIRED, "this API key has expired: ask for a new one")
        return Caller(key.name, key)

    def check_sees_all(self, caller: Caller) -> None:
        """Raises SollolError: KEY_SCOPE; the caller's key is for some models only, and this is about all of them."""
        key = caller.key
        if key is not None and key.models:
            why = f"the API key {key.name} is for {', '.join(key.models)}, and this is for keys of every model"
            self._refuse(key.name, "scope", Reason.KEY_SCOPE, why)

    def visible(self, caller: Caller, models: tuple[AvailableModel, ...]) -> tuple[AvailableModel, ...]:
        """Those of the models that the caller may use."""
        return tuple(model for model in models if caller.may_use(model.name))

    def admit(self, token: str | None, model: str, *, sent_as: str = HTTP_HEADERS) -> Permit:
        """`authenticate` and `permit` in one."""
        return self.permit(self.authenticate(token, sent_as=sent_as), model)

    def permit(self, caller: Caller, model: str) -> Permit:
        """Let the caller ask for a model, by a name or alias, once.

        Raises:
            SollolError: KEY_SCOPE, KEY_CONCURRENCY, KEY_TOKENS, or what `known` raises.
        """
        key = caller.key
        if key is None:
            return Permit(caller, _Use(), None, self._clock)
        if key.models:
            self._check_scope(key, model)
        use = self._uses.setdefault(key.sha256, _Use())
        allowance = use.metered(key, self._clock())
        self._check_concurrency(key, use)
        if allowance is not None:
            self._check_tokens(key, allowance)
        return Permit(caller, use, allowance, self._clock)

    def _check_scope(self, key: Key, model: str) -> None:
        known = self._known(model)
        if not key.covers(known or model):
            why = f"the API key {key.name} is for {', '.join(key.models)}, not for {model}"
            self._refuse(key.name, "scope", Reason.KEY_SCOPE, why)
        if known is None:
            raise refuse(Reason.MODEL_NOT_FOUND, f"no node has a model named {model}; /v1/models lists this key's")

    def _check_concurrency(self, key: Key, use: _Use) -> None:
        if key.concurrency is not None and use.running >= key.concurrency:
            raise self._refusal(
                Reason.KEY_CONCURRENCY,
                f"the API key {key.name} has {use.running} requests running, its limit is {key.concurrency}",
                retryable=True,
                retry_after_s=CONCURRENCY_RETRY_AFTER_S,
                numbers={"running": use.running, "concurrency": key.concurrency},
            )

    def _check_tokens(self, key: Key, allowance: Allowance) -> None:
        wait_s = allowance.wait_s(self._clock())
        if wait_s > 0:
            raise self._refusal(
                Reason.KEY_TOKENS,
                f"the API key {key.name} has used its {allowance.per_minute} tokens per minute; ask again in "
                f"{wait_s:.0f} s",
                retryable=True,
                retry_after_s=wait_s,
                numbers={"tokens_per_minute": allowance.per_minute},
            )

    def _refuse(self, name: str, why: str, reason: Reason, message: str) -> NoReturn:
        log.warning("key_refused", key_name=name, why=why, reason=reason)
        raise self._refusal(reason, message)

    def _refusal(self, reason: Reason, message: str, **more: Any) -> SollolError:
        self._refused(reason)
        return refuse(reason, message, **more)
