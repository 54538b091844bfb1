"""Every setting of the agent. Environment `SOLLOL_AGENT_<NAME>`, file `/etc/sollol/agent.toml`, flags `--name`."""

import re
import socket
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, field
from sollol.broker import check_broker
from sollol.config import ConfigError, is_loopback
from sollol.config_types import (
    LogFormat,
    LogLevel,
    MqttCaFile,
    MqttCluster,
    MqttDiscoveryPrefix,
    MqttPasswordFile,
    MqttUrl,
    NotNegative,
    Port,
    Seconds,
)

COORDINATOR_PORTS = 64
LIVE = frozenset(
    {"model_dirs", "ollama_dir", "huggingface_dir", "caps", "labels", "heartbeat_s", "lease_s", "rescan_s"}
    | {"log_level", "log_format"}
)  # a reload changes these, anything else needs a restart
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")  # what HTTP takes as a bearer token


class AgentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes are bytes, durations seconds. Empty strings mean "not set"."""

    node_id: Annotated[
        str, Meta(min_length=1, description="This node's name in the cluster; this host's by default")
    ] = field(default_factory=socket.gethostname)
    host: Annotated[str, Meta(min_length=1, description="The address heads reach this node at")] = "127.0.0.1"
    listen: Annotated[str, Meta(min_length=1, description="The address the gRPC server listens on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="The gRPC server's port")] = 7462
    tls_dir: Annotated[
        str,
        Meta(description="Where ca.pem, node.pem, node.key are; auto: /etc/sollol/pki/agent, the user's; empty: none"),
    ] = "auto"
    insecure: Annotated[bool, Meta(description="Allow listening off loopback without TLS")] = False
    redis_url: Annotated[
        str, Meta(description="The registry; empty: none, and heads must list this agent themselves")
    ] = "redis://127.0.0.1:6379/0"
    model_dirs: Annotated[tuple[str, ...], Meta(description="Directories of GGUF files")] = ("~/models",)
    ollama_dir: Annotated[
        str, Meta(description="Ollama's models; auto: $OLLAMA_MODELS or the usual places; empty: off")
    ] = "auto"
    huggingface_dir: Annotated[
        str, Meta(description="Hugging Face's cache; auto: its own variables or ~/.cache/huggingface/hub; empty: off")
    ] = "auto"
    engine: Annotated[
        str, Meta(description="Path of a llama-server; empty: PATH, then the built one, then the xllamacpp wheel")
    ] = ""
    threads: Annotated[NotNegative, Meta(description="Threads of each engine; 0: the cores this process may use")] = 0
    rpc_ports: Annotated[
        str,
        Meta(
            min_length=1,
            description="First and last port for lending devices; other nodes reach the upper half",
        ),
    ] = "7500-7699"
    rpc_transport: Annotated[
        str,
        Meta(
            pattern="^(tunnel|direct)$",
            description="How RPC bytes go to other nodes: tunnel (TLS, needs tls_dir) or direct (plain); alike on all",
        ),
    ] = "tunnel"
    coordinator_listen: Annotated[
        str,
        Meta(
            pattern="^(unix|tcp)$",
            description="tcp: engines listen on a port of `listen` too, for tools that shall reach them past the head",
        ),
    ] = "unix"
    coordinator_port: Annotated[
        int, Meta(ge=1024, le=32_704, description="The first of 64 ports for that, a pool each, the lowest free one")
    ] = 18_080
    coordinator_key_file: Annotated[
        str, Meta(description="A file with the key that engines on a port ask of everybody; empty: none")
    ] = ""
    caps: Annotated[
        dict[str, NotNegative], Meta(description="The most bytes to use on a device, by device id (CPU, CUDA0)")
    ] = field(default_factory=dict)
    labels: Annotated[
        dict[str, str], Meta(description="What requests can require or prefer, such as gpu_node or rack")
    ] = field(default_factory=dict)
    heartbeat_s: Annotated[Seconds, Meta(description="How often a report is written to the registry")] = 2.0
    lease_s: Annotated[Seconds, Meta(description="How long a report stands in the registry without a new one")] = 8.0
    rescan_s: Annotated[Seconds, Meta(description="How often model directories are looked through again")] = 30.0
    start_timeout_s: Annotated[
        Seconds, Meta(description="How long a starting engine may make no progress before it is given up")
    ] = 600.0
    stop_grace_s: Annotated[Seconds, Meta(description="From SIGTERM to SIGKILL when an engine is stopped")] = 5.0
    mqtt_url: MqttUrl = ""
    mqtt_password_file: MqttPasswordFile = ""
    mqtt_ca_file: MqttCaFile = ""
    mqtt_cluster: MqttCluster = "default"
    mqtt_interval_s: Annotated[
        Seconds,
        Meta(description="How often state is published when nothing happens; brokers drop it after three times"),
    ] = 10.0
    mqtt_discovery: Annotated[bool, Meta(description="Tell Home Assistant of this node and its pools")] = True
    mqtt_discovery_prefix: MqttDiscoveryPrefix = "homeassistant"
    leave_engines: Annotated[
        bool, Meta(description="Leave engines running when the agent ends, for the next one; systemd's unit sets it")
    ] = False
    orphan_ttl_s: Annotated[
        Seconds, Meta(description="How long engines of an earlier agent that no record accounts for are left alone")
    ] = 120.0
    state_dir: Annotated[
        str, Meta(description="What outlives a restart; auto: systemd's directory, else ~/.local/state/sollol")
    ] = "auto"
    log_dir: Annotated[
        str, Meta(description="Engines' logs; auto: systemd's directory, else ~/.local/state/sollol/log")
    ] = "auto"
    run_dir: Annotated[
        str, Meta(description="Engines' sockets, a short path; auto: systemd's, $XDG_RUNTIME_DIR, or /tmp/sollol-UID")
    ] = "auto"
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    exit_with_parent: Annotated[
        bool, Meta(description="Leave when standard input ends; `sollol up` starts its children so")
    ] = False

    def __post_init__(self) -> None:
        self.rpc_port_range()
        check_broker(self.mqtt_url, self.mqtt_password_file)
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s is {self.lease_s:g} with heartbeat_s = {self.heartbeat_s:g}: one late report would make the "
                "node vanish from the registry; it must be at least twice as long"
            )
        if self.coordinator_listen == "tcp":
            self._check_coordinators()

    def _check_coordinators(self) -> None:
        if not (is_loopback(self.listen) or self.insecure or self.coordinator_key_file):
            raise ValueError(
                f'coordinator_listen = "tcp" with listen = "{self.listen}" lets anyone there use the engines: name a '
                "coordinator_key_file, or set insecure = true if you trust that whole network"
            )
        ports, lent = self.coordinator_ports(), self.rpc_port_range()
        if ports.start < lent.stop and lent.start < ports.stop:
            raise ValueError(
                f"coordinator_port is {ports.start}, and {ports.start} to {ports.stop - 1} overlap with rpc_ports"
            )

    def coordinator_ports(self) -> range:
        return range(self.coordinator_port, self.coordinator_port + COORDINATOR_PORTS)

    def coordinator_key(self) -> str:
        """The key in the file, empty when none is named; lines that begin with # are comments.

        Raises:
            ConfigError: the file cannot be read, or has no key or more than one.
        """
        if not self.coordinator_key_file:
            return ""
        path = Path(self.coordinator_key_file).expanduser()
        try:
            lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"coordinator_key_file = {path}: cannot be read: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
            raise ConfigError(f"coordinator_key_file = {path}: must hold one key of A-Z a-z 0-9 . _ ~ + / = -")
        return keys[0]

    def expanded_model_dirs(self) -> tuple[Path, ...]:
        return tuple(Path(item).expanduser() for item in self.model_dirs)

    def rpc_port_range(self) -> range:
        """Raises ValueError: it is not two ports in order. One would leave none for the half that others reach."""
        first, dash, last = self.rpc_ports.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) < int(last) <= 65535):
            raise ValueError(f"rpc_ports is {self.rpc_ports!r}, not first and last port such as 7500-7699")
        return range(int(first), int(last) + 1)

    def engine_path(self) -> Path | None:
        return Path(self.engine).expanduser() if self.engine else None
