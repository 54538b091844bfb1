"""How this node lends its devices, by its settings and its certificate."""

import structlog
from sollol.config import is_loopback
from sollol.tls import TlsFiles

from agent.config import AgentConfig
from agent.engine.find import FoundEngine
from agent.supervisor.lending import BackendSite

log = structlog.get_logger(__name__)


def lending_site(config: AgentConfig, found: FoundEngine | None, tls: TlsFiles | None) -> BackendSite:
    """RPC bytes go through tunnels when the settings want it and there is a certificate to do it with."""
    tunnels = config.rpc_transport == "tunnel" and tls is not None
    if not tunnels and not is_loopback(config.listen):
        hint = "anyone on that network can read prompts and weights of models that span nodes, and pretend to be a node"
        log.warning("rpc_bytes_in_plain_text", listen=config.listen, rpc_transport=config.rpc_transport, hint=hint)
    return BackendSite(
        program=found.rpc_server if found else None,
        node_id=config.node_id,
        host=config.host,
        listen=config.listen,
        ports=config.rpc_port_range(),
        tls_dir=tls.directory if tunnels and tls is not None else None,
    )
