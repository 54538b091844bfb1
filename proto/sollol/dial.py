"""A TLS connection made only to see who answers, and why not: gRPC's own errors do not tell."""

import asyncio
import ssl

from sollol.certificates import Certificate
from sollol.errors import Reason, SollolError, refuse
from sollol.identity import Identity, Role, role_name
from sollol.tls import TlsFiles, shown

WITHIN_S = 3.0
_PORTS = 1 << 16
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME = 10, 9, 62  # OpenSSL's X509_V_ERR_…


async def who_listens(address: str, tls: TlsFiles, role: Role) -> tuple[Identity, Certificate]:
    """Who the gRPC server at `address` (`host:port`) is, and what says so, when it is of that role and admits us.

    Raises:
        SollolError: AGENT_UNREACHABLE when nobody answers, INVALID_REQUEST for what is no address; else the reason why
            one of the two refuses the other.
    """
    host, port = _host_and_port(address)
    try:
        async with asyncio.timeout(WITHIN_S):
            reader, writer = await asyncio.open_connection(
                host, port, ssl=tls.client_context(http2=True), server_hostname=role_name(role)
            )
            try:
                connection = writer.get_extra_info("ssl_object")
                identity = tls.peer(connection)
                # In TLS 1.3 a server that refuses us says so after the handshake; one that does not sends its settings.
                if not await reader.read(1):
                    raise _refused_us(address, identity, tls)
                return identity, shown(connection)
            finally:
                writer.transport.abort()
    except ssl.SSLCertVerificationError as error:
        raise _not_trusted(address, role, error) from error
    except ConnectionResetError as error:
        raise _reset(address, tls) from error
    except ssl.SSLError as error:
        raise _no_tls(address, error) from error
    except (OSError, TimeoutError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "no answer in time"
        raise refuse(Reason.AGENT_UNREACHABLE, f"{address} cannot be reached: {problem}", retryable=True) from error


async def speaks_tls(address: str) -> bool:
    """Whether whoever listens at `address` answers a TLS greeting. Nobody is trusted for it, and nothing is said.

    Raises:
        SollolError: INVALID_REQUEST; it is no address.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = _host_and_port(address)
    try:
        async with asyncio.timeout(WITHIN_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError):  # ssl.SSLError is an OSError
        return False
    writer.transport.abort()
    return True


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not (_is_name(host) and port.isdecimal() and int(port) < _PORTS):
        raise refuse(Reason.INVALID_REQUEST, f"{address[:100]!r} is not HOST:PORT, such as 192.168.1.10:7461")
    return host.strip("[]"), int(port)


def _is_name(host: str) -> bool:
    """Whether the resolver takes it; it raises no OSError for a name that is none, such as `a..b`."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _not_trusted(address: str, role: Role, error: ssl.SSLCertVerificationError) -> SollolError:
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        why = error.verify_message
        return refuse(
            Reason.CERTIFICATE_EXPIRED, f"the certificate of {address}: {why}; `sollol pki rotate` renews it there"
        )
    if error.verify_code == _OTHER_NAME:
        return refuse(Reason.WRONG_ROLE, f"what answers at {address} has no certificate of a role {role}")
    return refuse(
        Reason.FOREIGN_CERTIFICATE,
        f"the certificate of {address} is not of our authority ({error.verify_message}): is it of this cluster?",
    )


def _refused_us(address: str, identity: Identity, tls: TlsFiles) -> SollolError:
    ours = tls.current().certificate
    return refuse(
        Reason.FOREIGN_CERTIFICATE,
        f"{identity} at {address} refuses our certificate {ours.serial} ({ours.identity}): it has expired, or is not "
        "of the authority that it trusts; its log says which",
    )


def _reset(address: str, tls: TlsFiles) -> SollolError:
    ours = tls.current().certificate.identity
    return refuse(
        Reason.AGENT_UNREACHABLE, f"{address} breaks off the handshake with us ({ours}); its log may say why",
        retryable=True,
    )  # fmt: skip


def _no_tls(address: str, error: ssl.SSLError) -> SollolError:
    return refuse(
        Reason.NO_CERTIFICATE, f"what answers at {address} speaks no TLS as we do ({error.reason}): has it a tls_dir?"
    )
