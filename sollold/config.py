"""Every setting of the head. Environment `SOLLOL_HEAD_<NAME>`, file `/etc/sollol/head.toml`, flags `--name`."""

import socket
from typing import Annotated

from msgspec import Meta, Struct, field
from sollol.broker import check_broker
from sollol.config_types import (
    LogFormat,
    LogLevel,
    MqttCaFile,
    MqttCluster,
    MqttDiscoveryPrefix,
    MqttPasswordFile,
    MqttUrl,
    Port,
    Positive,
    Seconds,
)

from sollold.options import KvType, ModelOptions, Policy, Strategy, check_tables

RequireKeys = Annotated[str, Meta(pattern="^(auto|always|never)$")]
LIVE = frozenset(
    {"agents", "policy", "strategy", "context_per_slot", "parallel", "kv_type", "models"}
    | {"max_queue", "first_byte_timeout_s", "stall_timeout_s", "load_timeout_s", "log_level", "log_format"}
)  # a reload changes these, anything else needs a restart


class HeadConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes are bytes, durations seconds. Empty strings mean "not set"."""

    listen: Annotated[str, Meta(min_length=1, description="The address HTTP and gRPC listen on")] = "127.0.0.1"
    host: Annotated[
        str, Meta(min_length=1, description="The address this machine's own agent is known by; `local` means that one")
    ] = "127.0.0.1"
    http_port: Annotated[Port, Meta(description="The OpenAI-compatible API's port")] = 7460
    http_tls_cert: Annotated[
        str, Meta(description="A certificate chain (PEM) for HTTPS on http_port instead of HTTP; empty: none")
    ] = ""
    http_tls_key: Annotated[str, Meta(description="The key of http_tls_cert")] = ""
    grpc_port: Annotated[Port, Meta(description="The gRPC API's port")] = 7461
    tls_dir: Annotated[
        str,
        Meta(description="Where ca.pem, node.pem, node.key are; auto: /etc/sollol/pki/head, the user's; empty: none"),
    ] = "auto"
    insecure: Annotated[bool, Meta(description="Allow listening off loopback without TLS and keys")] = False
    keys_file: Annotated[
        str, Meta(min_length=1, description="What `sollol keys` writes; auto: keys.json in the head's state directory")
    ] = "auto"
    require_keys: Annotated[
        RequireKeys,
        Meta(description="Whether requests need a key; auto: off loopback, and on it once there is one"),
    ] = "auto"
    redis_url: Annotated[str, Meta(description="The registry; empty: none, only `agents` are known")] = (
        "redis://127.0.0.1:6379/0"
    )
    agents: Annotated[
        tuple[str, ...], Meta(description="Agents (host:port) to watch even when the registry does not list them")
    ] = ()
    state_dir: Annotated[
        str,
        Meta(min_length=1, description="Where agents are remembered; auto: systemd's directory, else the user's"),
    ] = "auto"
    policy: Annotated[
        Policy, Meta(description="How nodes are chosen; fit falls back to classic for models without a readable header")
    ] = "fit"
    strategy: Annotated[Strategy, Meta(description="What decides between plans that are equally fast")] = "pack"
    context_per_slot: Annotated[
        Positive, Meta(description="Tokens of context per request, clamped to what the model was trained for")
    ] = 4096
    parallel: Annotated[Positive, Meta(description="Requests one coordinator generates for at the same time")] = 4
    kv_type: Annotated[KvType, Meta(description="Type of the KV cache")] = "f16"
    stale_after_s: Annotated[Seconds, Meta(description="A node silent for longer takes no new model")] = 8.0
    forget_after_s: Annotated[Seconds, Meta(description="A node silent for longer is not listed any more")] = 60.0
    reservation_ttl_s: Annotated[
        Seconds, Meta(description="How long an agent keeps bytes for us before we start the engine on them")
    ] = 30.0
    load_timeout_s: Annotated[Seconds, Meta(description="The longest a model may take from placement to ready")] = 900.0
    max_queue: Annotated[Positive, Meta(description="Waiting requests per model")] = 1024
    max_body_bytes: Annotated[Positive, Meta(description="The largest HTTP request body")] = 33_554_432
    first_byte_timeout_s: Annotated[Seconds, Meta(description="For the engine's queue and the prompt together")] = 600.0
    stall_timeout_s: Annotated[Seconds, Meta(description="Between two pieces of a running stream")] = 60.0
    shutdown_grace_s: Annotated[Seconds, Meta(description="What running streams get to end in at shutdown")] = 10.0
    mqtt_url: MqttUrl = ""
    mqtt_password_file: MqttPasswordFile = ""
    mqtt_ca_file: MqttCaFile = ""
    mqtt_cluster: MqttCluster = "default"
    mqtt_head_id: Annotated[
        str, Meta(description="This head's name in MQTT topics; empty: this host's and the HTTP port")
    ] = ""
    mqtt_discovery_prefix: MqttDiscoveryPrefix = "homeassistant"
    mqtt_inference: Annotated[
        bool, Meta(description="Answer requests that devices publish; off: nothing that arrives by MQTT is obeyed")
    ] = False
    mqtt_requests: Annotated[Positive, Meta(description="Requests over MQTT answered at the same time")] = 32
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    exit_with_parent: Annotated[
        bool, Meta(description="Leave when standard input ends; `sollol up` starts its children so")
    ] = False
    models: Annotated[
        dict[str, ModelOptions],
        Meta(description="Options of the model of that name; those in `default` are for all that say nothing else"),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tables(self.models)
        if bool(self.http_tls_cert) != bool(self.http_tls_key):
            raise ValueError("http_tls_cert and http_tls_key belong together: name both, or neither")
        check_broker(self.mqtt_url, self.mqtt_password_file)

    def head_id(self) -> str:
        return self.mqtt_head_id or f"{socket.gethostname()}-{self.http_port}"
