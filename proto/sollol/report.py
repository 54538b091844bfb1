"""What nodes say and heads decide: frozen values, field for field as `common.proto` documents them. `_s`: seconds."""

from enum import StrEnum

from msgspec import Struct, field

from sollol.correction import Correction, MemoryCorrection
from sollol.engine import Engine
from sollol.errors import Refusal
from sollol.link import Link, PlanLink
from sollol.speed import SpeedObservation


class DeviceKind(StrEnum):
    CPU = "CPU"
    GPU = "GPU"


class InstanceState(StrEnum):
    STOPPED = "STOPPED"
    STARTING = "STARTING"
    READY = "READY"
    STOPPING = "STOPPING"
    BACKOFF = "BACKOFF"
    FAILED = "FAILED"
    LOST = "LOST"


class InstanceKind(StrEnum):
    COORDINATOR = "COORDINATOR"
    BACKEND = "BACKEND"


class RpcTransport(StrEnum):
    """How the bytes between a coordinator and a backend on another node travel."""

    TUNNEL = "TUNNEL"
    DIRECT = "DIRECT"


class Device(Struct, frozen=True, kw_only=True):
    """One memory that layers can be put into. `free_bytes` is what a new reservation may take."""

    device_id: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    measured_free_bytes: int = 0
    reserved_bytes: int = 0
    name: str = ""
    vendor: str = ""
    age_s: float = 0.0
    cap_bytes: int | None = None
    bandwidth_bytes_per_s: float = 0.0
    unified: bool = False
    usable: bool = True


class ModelShape(Struct, frozen=True, kw_only=True):
    """What the memory model needs of a GGUF file. Per-layer tuples have `layers` entries."""

    architecture: str
    layers: int
    embedding_length: int
    feed_forward_length: int
    heads: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    vocabulary: int
    context_length: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    experts: int = 0
    experts_used: int = 0
    expert_bytes: tuple[int, ...] = ()
    recurrent_bytes: tuple[int, ...] = ()
    tied_bytes: int = 0
    expert_feed_forward_length: int = 0
    inner_length: int = 0
    state_length: int = 0
    group_count: int = 0
    step_rank: int = 0
    indexer_length: int = 0
    largest_tensor_bytes: tuple[int, ...] = ()


class Model(Struct, frozen=True, kw_only=True):
    """A GGUF that a node can load. Exactly one of `shape` and `problem` is set."""

    name: str
    size_bytes: int
    identity: str
    source: str = "directory"
    quantization: str = ""
    shape: ModelShape | None = None
    problem: Refusal | None = None
    has_chat_template: bool = False
    aliases: tuple[str, ...] = ()


class DeviceShare(Struct, frozen=True, kw_only=True):
    """What a plan puts on one device; `total_bytes` is the sum of the other four, and what is reserved. A lent GPU
    takes `host_bytes` of its node's RAM beside. `node_id` is empty for the coordinator's own node.
    """

    device_id: str
    layers: int
    first_layer: int | None = None
    last_layer: int | None = None
    weight_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    margin_bytes: int = 0
    total_bytes: int = 0
    node_id: str = ""
    logged_bytes: int | None = None
    host_bytes: int = 0


class BackendEndpoint(Struct, frozen=True, kw_only=True):
    """Where a coordinator reaches one backend: its forwarder on the backend's node."""

    node_id: str
    host: str
    port: int
    device_ids: tuple[str, ...]
    threads: int = 0
    tunnelled: bool = False


class CoordinatorPlan(Struct, frozen=True, kw_only=True):
    """How to run one model. `shares` are in the order of the layers and add up to the model's layers + 1, the output
    layer being the last.

    On one node: the CPU first (front layers), then GPUs in engine order. With backends: the coordinator's own CPU
    first, without layers (token embeddings, output buffer), then every device that holds some; `backends` is filled in
    once they have started.
    """

    model: str
    parallel: int
    context_per_slot: int
    shares: tuple[DeviceShare, ...]
    kv_type: str = "f16"
    batch: int = 512
    ubatch: int = 512
    threads: int = 0
    backends: tuple[BackendEndpoint, ...] = ()
    pool_number: int = 0
    predicted_ms_per_token: float = 0.0
    pool_secret: bytes = b""


class Instance(Struct, frozen=True, kw_only=True):
    """One supervised engine process; a coordinator's `instance_id` is the pool id its caller chose."""

    instance_id: str
    model: str
    state: InstanceState
    percent: float = 0.0
    parallel: int = 1
    context_per_slot: int = 0
    active_streams: int = 0
    pid: int = 0
    started_unix_s: float = 0.0
    refusal: Refusal | None = None
    shares: tuple[DeviceShare, ...] = ()
    kind: InstanceKind = InstanceKind.COORDINATOR
    pool_id: str = ""
    pool_number: int = 0
    endpoint: str = ""
    predicted_ms_per_token: float = 0.0
    observed_ms_per_token: float = 0.0


class Reservation(Struct, frozen=True, kw_only=True):
    """Bytes per device id that the ledger promised to one pool; `expires_in_s` is None once an engine runs on it."""

    pool_id: str
    bytes: dict[str, int]
    expires_in_s: float | None = None


class Report(Struct, frozen=True, kw_only=True):
    """Everything one node says of itself. `devices[0]` is always the CPU."""

    node_id: str
    host: str
    port: int
    devices: tuple[Device, ...]
    boot_id: str = ""
    sequence: int = 0
    measured_unix_s: float = 0.0
    cpu_count: int = 1
    engine: Engine | None = None
    models: tuple[Model, ...] = ()
    instances: tuple[Instance, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    cordoned: bool = False
    version: str = ""
    links: tuple[Link, ...] = ()
    speeds: tuple[SpeedObservation, ...] = ()
    memory: tuple[MemoryCorrection, ...] = ()
    draining: bool = False
    rpc_transport: RpcTransport = RpcTransport.DIRECT
    certificate_expires_in_s: float | None = None
    agent_token: str = ""
    engines_unlimited: str = ""

    @property
    def address(self) -> str:
        """`host:port` of the agent's gRPC server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class PlacementWish(Struct, frozen=True, kw_only=True):
    """What the asker wants; None or empty means the head's configuration decides."""

    model: str
    policy: str | None = None
    context_per_slot: int | None = None
    parallel: int | None = None
    kv_type: str | None = None
    require: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    min_cpus: int | None = None
    min_memory_bytes: int | None = None
    pinned_node: str | None = None
    local: bool = False
    strategy: str | None = None
    max_nodes: int | None = None
    backends_per_pool: int | None = None
    allow_reduced_context: bool | None = None


class ScorePart(Struct, frozen=True):
    name: str
    value: float


class NodeVerdict(Struct, frozen=True, kw_only=True):
    """One node in a decision: scored (`score` is the sum of `parts`) or refused by a filter.

    `shares` are what a plan over several nodes puts on this one, which lends them unless it is `best`.
    """

    node_id: str
    host: str
    score: float | None = None
    parts: tuple[ScorePart, ...] = ()
    refusal: Refusal | None = None
    needed_bytes: int = 0
    free_bytes: int = 0
    best: bool = False
    shares: tuple[DeviceShare, ...] = ()


class Decision(Struct, frozen=True, kw_only=True):
    """The record of one placement: it is the explanation, `explain` only formats it.

    `unit` is "MB" (classic, highest score wins) or "ms/token" (fit, lowest wins). Exactly one of `coordinator`
    (a node id) and `refusal` is set. `ready_s`, the sum of `ready_parts`, is predicted by fit only.
    """

    model: str
    policy: str
    unit: str
    nodes: tuple[NodeVerdict, ...]
    estimate_bytes: int = 0
    estimate_mb: int | None = None
    coordinator: str = ""
    coordinator_host: str = ""
    plan: CoordinatorPlan | None = None
    refusal: Refusal | None = None
    reduced_context_from: int | None = None
    correction: Correction | None = None
    ready_s: float | None = None
    ready_parts: tuple[ScorePart, ...] = ()
    links: tuple[PlanLink, ...] = ()


class NodeStatus(Struct, frozen=True, kw_only=True):
    """A node as one head sees it, by its own monotonic clock; `restarting`: its agent's last word before it went."""

    report: Report
    report_age_s: float
    connected: bool
    restarting: bool = False


class Pool(Struct, frozen=True, kw_only=True):
    node_id: str
    instance: Instance
