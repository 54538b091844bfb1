"""Serves one invitation: whoever shows its secret in time gets a certificate. Only here is the authority's key used."""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Self

import structlog
from msgspec import Struct
from sollol.contexts import load_chain
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.identity import Identity

from sollold.pki.authority import fingerprint, issue_requested, issue_server, new_key
from sollold.pki.invitations import Invitation, Invitations
from sollold.pki.messages import MOST_BYTES, SERVER_NAME, Answer, Hello, Join, read_question, write_line
from sollold.pki.store import Store, named
from sollold.pki.token import Token, encode, hashed

log = structlog.get_logger(__name__)

_SECRET_BYTES = 16


class Invited(Struct, frozen=True, kw_only=True):
    """What an invitation says. `redis_url` is told to the machine that joins; `days` is its certificate's life."""

    host: str
    port: int
    ttl_s: float
    days: float
    redis_url: str


class Inviter:
    """One open invitation. `async with` listens; `joined` waits until it has been used or is over.

    Raises:
        SollolError: PORT_TAKEN, when it cannot listen.
    """

    def __init__(
        self, store: Store, invitation: Invitation, terms: Invited, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._terms, self._clock = store, terms, clock
        self._invitations = Invitations(store.directory / "invitations.json")
        self._secret = os.urandom(_SECRET_BYTES)
        self._expires_s = clock() + terms.ttl_s
        self._invitation = invitation
        self._joined: asyncio.Future[Identity] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    @property
    def token(self) -> str:
        terms = self._terms
        return encode(
            Token(
                host=terms.host,
                port=terms.port,
                expires_s=int(self._expires_s),
                fingerprint=fingerprint(self._store.authority().certificate),
                secret=self._secret,
            )
        )

    async def __aenter__(self) -> Self:
        terms = self._terms
        try:
            self._server = await asyncio.start_server(
                self._serve, _listen_at(terms.host), terms.port, ssl=self._context(), limit=MOST_BYTES
            )
        except OSError as error:
            raise refuse(
                Reason.PORT_TAKEN,
                f"cannot listen on {terms.host}:{terms.port} ({error.strerror}): set --port or --address",
            ) from error
        self._invitations.add(
            Invitation(
                secret_hash=hashed(self._secret),
                expires_s=self._expires_s,
                role=self._invitation.role,
                node_id=self._invitation.node_id,
            ),
            now_s=self._clock(),
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def joined(self) -> Identity | None:
        """Who has joined; None when the time is over."""
        try:
            async with asyncio.timeout(self._terms.ttl_s):
                return await self._joined
        except TimeoutError:
            return None

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        key = new_key()
        load_chain(context, issue_server(self._store.authority(), SERVER_NAME, key), key)
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0]
        done: Identity | None = None
        try:
            answer, done = await self._answered(reader, peer)
            await write_line(writer, answer)
        except (ConnectionError, TimeoutError, ssl.SSLError) as error:
            log.warning("join_cut_off", peer=peer, problem=str(error))
        finally:
            writer.close()
        if done is not None and not self._joined.done():
            self._joined.set_result(done)

    async def _answered(self, reader: asyncio.StreamReader, peer: str) -> tuple[Answer, Identity | None]:
        try:
            asked = await read_question(reader)
            if isinstance(asked, Hello):
                return Answer(authority=self._store.authority().certificate.decode()), None
            return self._admitted(asked, peer)
        except SollolError as error:
            refusal: Refusal = error.refusal
            log.warning("join_refused", reason=refusal.reason, message=refusal.message, peer=peer)
            return Answer(refusal=refusal), None

    def _admitted(self, asked: Join, peer: str) -> tuple[Answer, Identity]:
        now_s, authority = self._clock(), self._store.authority()
        invitation = self._invitations.check(asked.secret, now_s=now_s)
        identity = named(authority.cluster, invitation.role, invitation.node_id or asked.node_id)
        if not invitation.node_id and self._store.is_taken(identity):
            raise refuse(
                Reason.INVALID_REQUEST,
                f"{identity} has a certificate already: join under another name (--node-id), or be invited by it "
                f"(`sollol pki invite --node {identity.node_id}`)",
            )
        chain = issue_requested(authority, identity, asked.request.encode(), days=self._terms.days)
        self._invitations.use(asked.secret, identity.node_id, now_s=now_s)
        self._store.record(chain)
        log.info("joined", identity=identity.uri, peer=peer)
        answer = Answer(
            cluster=identity.cluster,
            role=identity.role,
            node_id=identity.node_id,
            certificate=chain.decode(),
            ca=self._store.bundle().decode(),
            host=peer,
            redis_url=self._terms.redis_url,
        )
        return answer, identity


def _listen_at(host: str) -> str:
    """The address itself; a name may mean another one here than elsewhere, so then all of them."""
    try:
        ip_address(host)
    except ValueError:
        return "0.0.0.0"
    return host
