"""Options per model: what the head's configuration says about one model, or about all of them. Pure.

A wish wins over its model's own options, these over the options of all models (`default`), and these over the head's
settings.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace
from sollol.config_types import NotNegative
from sollol.errors import SollolError
from sollol.names import check_model_name
from sollol.report import PlacementWish

from sollold.placement.job import MAX_BACKENDS, MAX_CONTEXT, MAX_NODES, MAX_PARALLEL, PlacementDefaults, job_for
from sollold.scaling import MAX_POOLS

EVERY_MODEL = "default"

Policy = Annotated[str, Meta(pattern="^(fit|classic)$")]
Strategy = Annotated[str, Meta(pattern="^(pack|spread)$")]
KvType = Annotated[str, Meta(pattern="^(f32|f16|bf16|q8_0|q4_0|q4_1|iq4_nl|q5_0|q5_1)$")]
_Pools = Annotated[int, Meta(ge=1, le=MAX_POOLS)]
_Nodes = Annotated[int, Meta(ge=1, le=MAX_NODES)]
_Backends = Annotated[int, Meta(ge=0, le=MAX_BACKENDS)]
_Context = Annotated[int, Meta(ge=1, le=MAX_CONTEXT)]
_Parallel = Annotated[int, Meta(ge=1, le=MAX_PARALLEL)]


class ModelOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None and empty lists mean "not set". All but `pools` are the fields of `PlacementWish` of the same names."""

    pools: Annotated[
        _Pools | None, Meta(description="Pools that requests may bring up, one more whenever all slots are taken")
    ] = None
    max_nodes: Annotated[
        _Nodes | None, Meta(description="The most nodes that hold the model together; 1: never split it")
    ] = None
    backends_per_pool: Annotated[
        _Backends | None, Meta(description="Exactly so many backends; not set: as many as is fastest")
    ] = None
    policy: Annotated[Policy | None, Meta(description="How nodes are chosen")] = None
    strategy: Annotated[Strategy | None, Meta(description="What decides between plans that are equally fast")] = None
    context_per_slot: Annotated[_Context | None, Meta(description="Tokens of context per request")] = None
    parallel: Annotated[_Parallel | None, Meta(description="Requests one pool generates for at the same time")] = None
    kv_type: Annotated[KvType | None, Meta(description="Type of the KV cache")] = None
    allow_reduced_context: Annotated[
        bool | None, Meta(description="Take the longest context that fits where the asked one does not")
    ] = None
    require: Annotated[tuple[str, ...], Meta(description="Labels that each node must have, name or name=value")] = ()
    prefer: Annotated[tuple[str, ...], Meta(description="Labels that win a tie")] = ()
    min_cpus: Annotated[NotNegative | None, Meta(description="CPUs that the coordinator's node must have")] = None
    min_memory_bytes: Annotated[NotNegative | None, Meta(description="What must be free on the coordinator's node")] = (
        None
    )
    pinned_node: Annotated[str | None, Meta(description="The coordinator runs on this node or not at all")] = None


def check_tables(tables: Mapping[str, ModelOptions]) -> None:
    """Accept what placement accepts: else every request for the model would be refused, long after the mistake.

    Raises:
        ValueError: which table is wrong, and how.
    """
    options = Options(tables, known=lambda _: None)
    for name in tables:
        try:
            check_model_name(name)
            job_for(options.complete(PlacementWish(model=name)), PlacementDefaults())
        except SollolError as error:
            raise ValueError(f'[models."{name}"]: {error.refusal.message}') from error


class Options:
    """The configured options by model.

    Args:
        tables: By name or alias of a model, and `default` for all.
        known: The own name of the model that a name or alias means; None while no node has one.
    """

    def __init__(self, tables: Mapping[str, ModelOptions], *, known: Callable[[str], str | None]) -> None:
        self._tables = tables
        self._known = known

    def follow(self, tables: Mapping[str, ModelOptions]) -> None:
        """Go by these from now on."""
        self._tables = tables

    def pools(self, model: str) -> int:
        """How many pools of a model its requests alone may bring up."""
        return next((options.pools for options in self._of(model) if options.pools is not None), 1)

    def complete(self, wish: PlacementWish) -> PlacementWish:
        """The wish, with what it leaves open as the options say."""
        for options in self._of(wish.model):
            said = {name: getattr(options, name) for name in _IN_WISHES if getattr(wish, name) in (None, ())}
            wish = replace(wish, **said)
        return wish

    def _of(self, model: str) -> Iterator[ModelOptions]:
        """The model's own options first, then those of all models."""
        for name, options in self._tables.items():
            if name != EVERY_MODEL and model in (name, self._known(name)):
                yield options
        if EVERY_MODEL in self._tables:
            yield self._tables[EVERY_MODEL]


_IN_WISHES = tuple(name for name in ModelOptions.__struct_fields__ if name != "pools")
