"""The agent's port: with certificates and a guard, or in plaintext."""

import grpc.aio
from sollol.channels import bind, new_server
from sollol.errors import Reason, refuse
from sollol.guard import Guard
from sollol.tls import TlsFiles
from sollol.v1.agent_pb2_grpc import add_RevocationServiceServicer_to_server

from agent.revocation import RevocationService


def listening(host: str, port: int, tls: TlsFiles | None) -> grpc.aio.Server:
    """A server that has its port, and answers nobody before it is started.

    Raises:
        SollolError: PORT_TAKEN.
    """
    server = new_server([Guard(tls)] if tls is not None else ())
    if tls is not None:
        add_RevocationServiceServicer_to_server(RevocationService(tls), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bind(server, address, tls)
    except RuntimeError as error:
        raise refuse(
            Reason.PORT_TAKEN, f"cannot listen on {address}: is another agent running? Set port to another"
        ) from error
    return server
