"""Every setting of the head. Environment `SOLLOL_HEAD_<NAME>`, file `/etc/sollol/head.toml`, flags `--name`."""

from msgspec import Struct


class HeadConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes are bytes, durations seconds. Empty strings mean "not set"."""

    listen: str = "127.0.0.1"
    http_port: int = 7460
    grpc_port: int = 7461
    insecure: bool = False  # allow listening off loopback without TLS and keys
    redis_url: str = "redis://127.0.0.1:6379/0"  # "": no registry; only `agents` are known
    agents: tuple[str, ...] = ()  # host:port of agents to watch even when the registry does not list them
    policy: str = "fit"  # or "classic"; fit falls back to classic for models without a readable header
    strategy: str = "pack"  # or "spread"
    context_per_slot: int = 4096  # clamped to what the model was trained for
    parallel: int = 4
    kv_type: str = "f16"
    stale_after_s: float = 8.0  # a node silent for longer takes no new model
    forget_after_s: float = 60.0
    reservation_ttl_s: float = 30.0
    load_timeout_s: float = 900.0
    max_queue: int = 1024  # waiting requests per model
    max_body_bytes: int = 33_554_432
    first_byte_timeout_s: float = 600.0  # queue and prompt
    stall_timeout_s: float = 60.0  # between two pieces of a running stream
    shutdown_grace_s: float = 10.0
    log_level: str = "info"
    log_format: str = "auto"
    exit_with_parent: bool = False  # leave when standard input ends (used by `sollol up`)
