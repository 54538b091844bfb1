"""Every setting of the agent. Environment `SOLLOL_AGENT_<NAME>`, file `/etc/sollol/agent.toml`, flags `--name`."""

import socket
from pathlib import Path

from msgspec import Struct, field


class AgentConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes are bytes, durations seconds. Empty strings mean "not set"."""

    node_id: str = field(default_factory=socket.gethostname)
    host: str = "127.0.0.1"  # the address heads reach this node at
    listen: str = "127.0.0.1"
    port: int = 7462
    insecure: bool = False  # allow listening off loopback without TLS
    redis_url: str = "redis://127.0.0.1:6379/0"  # "": no registry; heads must list this agent themselves
    model_dirs: tuple[str, ...] = ("~/models",)
    ollama_dir: str = "auto"  # "auto": $OLLAMA_MODELS or the usual places; "": off
    huggingface_dir: str = "auto"
    engine: str = ""  # path of a llama-server; "": PATH, then the built one, then xllamacpp
    threads: int = 0  # per coordinator; 0: the cores this process may use
    caps: dict[str, int] = field(default_factory=dict)  # device id ("CPU", "CUDA0") to the most bytes to use there
    labels: dict[str, str] = field(default_factory=dict)
    heartbeat_s: float = 2.0
    lease_s: float = 8.0
    rescan_s: float = 30.0  # how often model directories are looked through again
    start_timeout_s: float = 600.0  # without any load progress
    stop_grace_s: float = 5.0  # TERM to KILL
    state_dir: str = "auto"  # "auto": systemd's $STATE_DIRECTORY, else XDG
    log_dir: str = "auto"
    run_dir: str = "auto"  # engine sockets; kept short, a unix socket path has at most 107 bytes
    log_level: str = "info"
    log_format: str = "auto"  # "console" on a terminal, else "json"
    exit_with_parent: bool = False  # leave when standard input ends (used by `sollol up`)

    def expanded_model_dirs(self) -> tuple[Path, ...]:
        return tuple(Path(item).expanduser() for item in self.model_dirs)
