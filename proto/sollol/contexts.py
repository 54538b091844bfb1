"""TLS 1.3 contexts from certificates in memory."""

import os
import ssl

from msgspec import Struct

from sollol.material import Material


class Kind(Struct, frozen=True):
    """A side of a connection, and what it says that it wants to speak."""

    protocol: int
    alpn: tuple[str, ...] = ()


SERVER = Kind(ssl.PROTOCOL_TLS_SERVER)
CLIENT = Kind(ssl.PROTOCOL_TLS_CLIENT)
HTTP2_CLIENT = Kind(ssl.PROTOCOL_TLS_CLIENT, ("h2",))


def new_context(material: Material, kind: Kind) -> ssl.SSLContext:
    """Raises ValueError or OSError, of which ssl.SSLError is one: key and certificate are none, or no pair."""
    context = ssl.SSLContext(kind.protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=material.ca.decode("ascii"))
    if kind.alpn:
        context.set_alpn_protocols(list(kind.alpn))
    load_chain(context, material.chain, material.key)
    return context


def load_chain(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Load what was read, not what files have become: OpenSSL takes paths only, so both are in memory."""
    descriptor = os.memfd_create("sollol-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, key + b"\n" + chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
