"""What an authority signs. Makes values only; `store` knows files.

Keys are P-256: every TLS stack has it, and signing is cheap on small machines.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct
from sollol.errors import Reason, refuse
from sollol.identity import Identity

AUTHORITY_DAYS = 3650
LEAF_DAYS = 90
# Clocks of small machines differ; one that is behind must not find a fresh certificate "not yet valid".
BACKDATED = timedelta(hours=1)
_NAMED = "SOLLOL "


class Authority(Struct, frozen=True):
    """A CA of one cluster: certificate and private key, PEM."""

    cluster: str
    certificate: bytes
    key: bytes


def new_key() -> bytes:
    """A private key, PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_authority(cluster: str, *, now: datetime | None = None) -> Authority:
    key = new_key()
    private = _private(key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{_NAMED}{cluster}")])
    certificate = (
        _builder(name, name, private.public_key(), AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    return Authority(cluster, _pem(certificate), key)


def issue(
    authority: Authority, identity: Identity, key: bytes, *, days: float = LEAF_DAYS, now: datetime | None = None
) -> bytes:
    """A certificate, PEM, for the owner of the private key."""
    return _issue(authority, identity, _private(key).public_key(), days, now)


def request(key: bytes) -> bytes:
    """A signing request, PEM: proves that whoever sends it has the key. The authority decides on the name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def issue_requested(authority: Authority, identity: Identity, asked: bytes, *, days: float = LEAF_DAYS) -> bytes:
    """A certificate, PEM, for whoever made the signing request.

    Raises:
        SollolError: INVALID_REQUEST; it is none, or not signed by the key it names.
    """
    try:
        csr = x509.load_pem_x509_csr(asked)
        valid = csr.is_signature_valid
    except (ValueError, InvalidSignature) as error:
        raise refuse(Reason.INVALID_REQUEST, f"the signing request is not readable: {error}") from error
    public = csr.public_key()
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise refuse(Reason.INVALID_REQUEST, "the signing request is not signed by a P-256 key of its own")
    return _issue(authority, identity, public, days, None)


def revocations(authority: Authority, serials: Iterable[str], number: int) -> bytes:
    """A signed list of revoked serial numbers (hexadecimal), PEM. Of two the one with the higher number counts."""
    now, private = datetime.now(UTC), _private(authority.key)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.load_pem_x509_certificate(authority.certificate).subject)
        .last_update(now - BACKDATED)
        .next_update(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
    )
    for serial in sorted(serials):
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def cluster_of(certificate: bytes) -> str:
    """The cluster that an authority's certificate (PEM) is for.

    Raises:
        SollolError: CERTIFICATE_UNREADABLE; it is not one of ours.
    """
    try:
        subject = x509.load_pem_x509_certificate(certificate).subject
    except ValueError as error:
        raise refuse(Reason.CERTIFICATE_UNREADABLE, f"the authority's certificate is not readable: {error}") from error
    names = [str(item.value) for item in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not names[0].startswith(_NAMED):
        raise refuse(Reason.CERTIFICATE_UNREADABLE, f"the authority is named {names}, not as `sollol pki init` does")
    return names[0].removeprefix(_NAMED)


def issue_server(authority: Authority, name: str, key: bytes, *, days: float = 1) -> bytes:
    """A certificate, PEM, that names a server and nobody of the cluster: no daemon admits it."""
    return _leaf(authority, name, [x509.DNSName(name)], _private(key).public_key(), days=days)


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a certificate (PEM): what a join token says of the authority."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256())


def _issue(
    authority: Authority, identity: Identity, public: ec.EllipticCurvePublicKey, days: float, now: datetime | None
) -> bytes:
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(identity.uri),
        *(x509.DNSName(name) for name in identity.dns_names),
    ]
    return _leaf(authority, f"{identity.role} {identity.node_id}", names, public, days=days, now=now)


def _leaf(
    authority: Authority,
    title: str,
    names: list[x509.GeneralName],
    public: ec.EllipticCurvePublicKey,
    *,
    days: float,
    now: datetime | None = None,
) -> bytes:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title[:64])])
    issuer_key = _private(authority.key).public_key()
    certificate = (
        _builder(subject, issuer.subject, public, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(_private(authority.key), hashes.SHA256())
    )
    return _pem(certificate)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float, now: datetime | None
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATED)
        .not_valid_after(start + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    private = serialization.load_pem_private_key(key, password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise refuse(Reason.CERTIFICATE_UNREADABLE, "the key is not a P-256 key: `sollol pki` makes these only")
    return private


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
