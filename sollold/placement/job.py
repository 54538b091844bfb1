"""What is to be placed: the asker's wish with every open question answered by the head's configuration."""

from msgspec import Struct
from sollol.errors import Reason, refuse
from sollol.memory import KV_TYPES
from sollol.report import PlacementWish

from sollold.placement.corrections import Learned
from sollold.placement.links import Links
from sollold.placement.load import Load
from sollold.placement.observed import NOTHING, Observed

POLICIES = ("classic", "fit")
STRATEGIES = ("pack", "spread")
MAX_CONTEXT = 16_777_216
MAX_PARALLEL = 1024
# The engine asserts fewer than 16 devices beside its CPU: so many backends at most, and the coordinator's node.
MAX_BACKENDS = 15
MAX_NODES = MAX_BACKENDS + 1
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class PlacementDefaults(Struct, frozen=True, kw_only=True):
    """The head's answers for whatever a wish leaves open; the values are those of `HeadConfig`."""

    policy: str = "fit"
    strategy: str = "pack"
    context_per_slot: int = 4096
    parallel: int = 4
    kv_type: str = "f16"
    stale_after_s: float = 8.0
    batch: int = 512
    ubatch: int = 512


class Job(Struct, frozen=True, kw_only=True):
    """A wish without open questions. Labels are (name, value); value None accepts any.

    `takes_any_node`: nothing in it keeps a node out. `learned`: what loads have shown of the model's memory.
    `observed`: how fast it ran.
    """

    model: str
    policy: str
    strategy: str
    context_per_slot: int
    parallel: int
    kv_type: str
    batch: int
    ubatch: int
    stale_after_s: float
    require: tuple[tuple[str, str | None], ...] = ()
    prefer: tuple[tuple[str, str | None], ...] = ()
    min_cpus: int = 0
    min_memory_bytes: int = 0
    pinned_node: str = ""
    local: bool = False
    own_hosts: frozenset[str] = LOOPBACK_HOSTS
    max_nodes: int = MAX_NODES
    backends_per_pool: int | None = None
    allow_reduced_context: bool = False
    links: Links = Links()
    learned: Learned = ()
    observed: Observed = NOTHING
    takes_any_node: bool = True

    @property
    def load(self) -> Load:
        return Load(
            context_per_slot=self.context_per_slot,
            parallel=self.parallel,
            kv_type=self.kv_type,
            batch=self.batch,
            ubatch=self.ubatch,
        )


def job_for(wish: PlacementWish, defaults: PlacementDefaults, *, head_host: str = "") -> Job:
    """Raises SollolError(INVALID_REQUEST) for a policy, strategy, KV type or number that means nothing."""
    return Job(
        model=wish.model,
        policy=_one_of("policy", wish.policy or defaults.policy, POLICIES),
        strategy=_one_of("strategy", wish.strategy or defaults.strategy, STRATEGIES),
        context_per_slot=_within("context_per_slot", wish.context_per_slot, defaults.context_per_slot, MAX_CONTEXT),
        parallel=_within("parallel", wish.parallel, defaults.parallel, MAX_PARALLEL),
        kv_type=_one_of("kv_type", wish.kv_type or defaults.kv_type, tuple(KV_TYPES)),
        batch=defaults.batch,
        ubatch=defaults.ubatch,
        stale_after_s=defaults.stale_after_s,
        require=_labels(wish.require),
        prefer=_labels(wish.prefer),
        min_cpus=wish.min_cpus or 0,
        min_memory_bytes=wish.min_memory_bytes or 0,
        pinned_node=wish.pinned_node or "",
        local=wish.local,
        # A node that reports a loopback address can only be on the head's own machine.
        own_hosts=LOOPBACK_HOSTS | ({head_host} if head_host else set()),
        max_nodes=_within("max_nodes", wish.max_nodes, MAX_NODES, MAX_NODES),
        backends_per_pool=_backends(wish.backends_per_pool, wish.max_nodes),
        allow_reduced_context=bool(wish.allow_reduced_context),
        takes_any_node=not (wish.require or wish.min_cpus or wish.min_memory_bytes or wish.pinned_node or wish.local),
    )


def has_label(labels: dict[str, str], label: tuple[str, str | None]) -> bool:
    name, wanted = label
    return name in labels and (wanted is None or labels[name] == wanted)


def label_text(label: tuple[str, str | None]) -> str:
    name, wanted = label
    return name if wanted is None else f"{name}={wanted}"


def _one_of(what: str, given: str, allowed: tuple[str, ...]) -> str:
    if given not in allowed:
        raise refuse(Reason.INVALID_REQUEST, f"{what} is {given[:80]!r}; use one of: {', '.join(allowed)}")
    return given


def _within(what: str, given: int | None, default: int, most: int) -> int:
    number = default if given is None else given
    if not 1 <= number <= most:
        raise refuse(Reason.INVALID_REQUEST, f"{what} is {number}; use 1 to {most}")
    return number


def _backends(backends: int | None, max_nodes: int | None) -> int | None:
    """Every backend is on a node of its own, and one of them may be the coordinator's."""
    if backends is None:
        return None
    most = MAX_BACKENDS if max_nodes is None else min(MAX_BACKENDS, max_nodes)
    if not 0 <= backends <= most:
        limit = "" if max_nodes is None or most == MAX_BACKENDS else f", since max_nodes is {max_nodes}"
        raise refuse(Reason.INVALID_REQUEST, f"backends_per_pool is {backends}; use 0 to {most}{limit}")
    return backends


def _labels(given: tuple[str, ...]) -> tuple[tuple[str, str | None], ...]:
    return tuple(_label(item) for item in given)


def _label(text: str) -> tuple[str, str | None]:
    name, separator, wanted = text.partition("=")
    if not name:
        raise refuse(Reason.INVALID_REQUEST, f"label {text[:80]!r} has no name; write name or name=value")
    return name, wanted if separator else None
