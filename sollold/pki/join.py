"""Joins a cluster with a token: makes a key that never leaves this machine, and has it certified."""

import asyncio
import ssl
import time
from collections.abc import Callable

from sollol.errors import Reason, SollolError, refuse
from sollol.identity import Role

from sollold.pki.authority import fingerprint, new_key, request
from sollold.pki.messages import MOST_BYTES, SERVER_NAME, WITHIN_S, Answer, Hello, Join, read_answer, write_line
from sollold.pki.token import Token, decode


async def join(text: str, node_id: str, *, clock: Callable[[], float] = time.time) -> tuple[Answer, bytes]:
    """What the inviting side answered, and our new key (PEM).

    Raises:
        SollolError: INVITATION_INVALID, INVITATION_EXPIRED, INVITATION_USED; AGENT_UNREACHABLE when nobody invites
            there any more; whatever else the other side refuses.
    """
    token = decode(text)
    if clock() > token.expires_s:
        raise refuse(Reason.INVITATION_EXPIRED, "this invitation is over: ask for another one (`sollol pki invite`)")
    first = await _ask(token, Hello(), _unverified())
    authority = first.authority.encode()
    if not _is_theirs(authority, token):
        raise refuse(
            Reason.INVITATION_INVALID,
            f"what answers at {token.host}:{token.port} is not of the authority that this token is from",
        )
    key = new_key()
    asked = Join(secret=token.secret, request=request(key).decode(), node_id=node_id)
    answer = await _ask(token, asked, _verified(authority))
    return answer, key


def _is_theirs(authority: bytes, token: Token) -> bool:
    try:
        return fingerprint(authority) == token.fingerprint
    except ValueError:
        return False


async def _ask(token: Token, message: Hello | Join, context: ssl.SSLContext) -> Answer:
    where = f"{token.host}:{token.port}"
    try:
        async with asyncio.timeout(WITHIN_S):
            reader, writer = await asyncio.open_connection(
                token.host, token.port, ssl=context, server_hostname=SERVER_NAME, limit=MOST_BYTES
            )
            try:
                await write_line(writer, message)
                answer = await read_answer(reader)
            finally:
                writer.transport.abort()
    except ssl.SSLError as error:
        raise refuse(Reason.INVITATION_INVALID, f"{where} is not who invited us: {error.reason}") from error
    except OSError as error:
        problem = error.strerror or "no answer in time"
        raise refuse(
            Reason.AGENT_UNREACHABLE,
            f"nobody invites at {where} ({problem}): `sollol pki invite` must run there until we have joined, and its "
            "port must be open",
        ) from error
    if answer.refusal is not None:
        raise SollolError(answer.refusal)
    return answer


def role_of(answer: Answer) -> Role:
    return Role(answer.role)


def _unverified() -> ssl.SSLContext:
    """For the first question: who answers it is checked against the token's fingerprint before anything is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _verified(authority: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context
