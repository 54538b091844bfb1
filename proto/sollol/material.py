"""What the files of one identity held at one moment, and which peers count by it."""

from msgspec import Struct

from sollol.certificates import Certificate
from sollol.errors import Reason, refuse
from sollol.identity import Identity
from sollol.revocations import Revocations


class Material(Struct, frozen=True, kw_only=True):
    """What the files held at one moment, checked to belong together.

    Attributes:
        authorities: The `key_id` of each in `ca`.
        chain: The certificate, PEM.
        revoked: Who is refused whatever their certificate says.
    """

    ca: bytes
    authorities: frozenset[str]
    chain: bytes
    key: bytes
    revoked: Revocations
    certificate: Certificate
    identity: Identity


def admitted(peer: Certificate, own: Material, *, now_s: float) -> Identity:
    """Who a peer is whose certificate TLS has verified, perhaps long ago on a connection that still lives.

    Raises:
        SollolError: FOREIGN_CERTIFICATE, CERTIFICATE_EXPIRED or CERTIFICATE_REVOKED.
    """
    identity = peer.identity
    if identity is None or identity.cluster != own.identity.cluster:
        who = identity or "nobody that SOLLOL knows"
        raise refuse(
            Reason.FOREIGN_CERTIFICATE, f"the certificate is that of {who}; this is cluster {own.identity.cluster}"
        )
    if peer.signed_by not in own.authorities:
        raise refuse(
            Reason.FOREIGN_CERTIFICATE, f"the certificate of {identity} is of an authority that is trusted no more"
        )
    if now_s > peer.not_after_s:
        raise refuse(
            Reason.CERTIFICATE_EXPIRED, f"the certificate of {identity} has expired: `sollol pki rotate` renews it"
        )
    if peer.serial in own.revoked.serials:
        raise refuse(Reason.CERTIFICATE_REVOKED, f"the certificate {peer.serial} of {identity} has been revoked")
    return identity
