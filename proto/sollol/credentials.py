"""gRPC's credentials for both ends of a connection between daemons."""

import grpc

from sollol.identity import Role, role_name
from sollol.tls import Material, TlsFiles


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Every client shows a certificate of our CA. Each handshake is made with the files as they then are."""
    told = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        material = files.current()
        if material is told:
            return None
        told = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(told),
        changed,  # type: ignore[arg-type]  # None means "unchanged", says gRPC's documentation
        require_client_authentication=True,
    )


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """A channel does not follow the files: whoever owns one opens another when they have changed."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.chain)


def expecting(role: Role, node_id: str = "") -> tuple[tuple[str, str], ...]:
    """Channel options that accept a peer of this role only, and of this id when one is given."""
    name = f"{node_id}.{role_name(role)}".lower() if node_id else role_name(role)
    return (("grpc.ssl_target_name_override", name),)


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.ca)
