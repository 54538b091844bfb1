"""HTTPS on the head's HTTP port: only that, with a certificate that is followed when it is renewed."""

import errno
import ssl
import time

import aiohttp
import pytest
from aiohttp import web
from sollol.config import ConfigError, load
from sollol.errors import Reason, SollolError
from structlog.testing import capture_logs

from sollold.config import HeadConfig
from sollold.front.http import serve
from sollold.front.https import https_files
from sollold.pki.authority import issue_server, new_authority, new_key
from tests.certificates import replace_file

DAY_S = 86_400


@pytest.fixture
def site(tmp_path):
    """Renews the files and returns who a client must trust to get in."""

    def renew(days=1):
        authority, key = new_authority("web"), new_key()
        replace_file(tmp_path / "key.pem", key)
        replace_file(tmp_path / "cert.pem", issue_server(authority, "localhost", key, days=days))
        return ssl.create_default_context(cadata=authority.certificate.decode())

    renew.files = (str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    return renew


def left_s(files):
    return files.expires_unix_s - time.time()


async def hello(_request):
    return web.Response(text="hello")


async def answered(port, trusted, scheme="https"):
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{scheme}://localhost:{port}/", ssl=trusted) as response,
    ):
        return await response.text()


async def test_a_renewed_certificate_is_shown_to_the_next_client_and_http_is_not_served(site, ports):
    app, port = web.Application(), ports()
    app.router.add_get("/", hello)
    first, files = site(), https_files(*site.files)
    runner = await serve(app, "127.0.0.1", port, files.context)
    try:
        assert await answered(port, first) == "hello"
        assert left_s(files) == pytest.approx(DAY_S, abs=60)
        second = site(days=2)
        assert await answered(port, second) == "hello"
        assert left_s(files) == pytest.approx(2 * DAY_S, abs=60)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await answered(port, first)
        with pytest.raises(aiohttp.ClientError):
            await answered(port, False, scheme="http")
    finally:
        await runner.cleanup()


async def test_half_of_a_renewal_leaves_the_former_certificate_in_use(site, ports, tmp_path):
    trusted = site()
    app, port = web.Application(), ports()
    app.router.add_get("/", hello)
    runner = await serve(app, "127.0.0.1", port, https_files(*site.files).context)
    try:
        replace_file(tmp_path / "key.pem", new_key())
        with capture_logs() as logs:
            assert await answered(port, trusted) == "hello"
        assert [entry["event"] for entry in logs] == ["certificate_not_followed"]
    finally:
        await runner.cleanup()


async def test_an_error_that_passes_while_a_renewal_is_read_delays_it_by_no_more_than_that(site, ports, monkeypatch):
    app, port = web.Application(), ports()
    app.router.add_get("/", hello)
    first, files = site(), https_files(*site.files)
    runner = await serve(app, "127.0.0.1", port, files.context)

    def fail(*_files):
        raise OSError(errno.EMFILE, "Too many open files")

    try:
        second = site(days=2)
        with capture_logs() as logs, monkeypatch.context() as patched:
            patched.setattr(files, "_loaded", fail)
            assert await answered(port, first) == "hello"
            assert await answered(port, first) == "hello"
        assert [entry["event"] for entry in logs] == ["certificate_not_followed"]
        assert await answered(port, second) == "hello"
    finally:
        await runner.cleanup()


def test_files_that_are_not_there_or_do_not_fit_are_named(site, tmp_path):
    with pytest.raises(SollolError, match=r"cert\.pem") as raised:
        https_files(*site.files)
    assert raised.value.refusal.reason is Reason.CERTIFICATE_UNREADABLE
    site()
    replace_file(tmp_path / "key.pem", new_key())
    with pytest.raises(SollolError, match="CERTIFICATE_UNREADABLE"):
        https_files(*site.files)
    assert https_files("", "") is None


def test_one_of_the_two_files_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        load(HeadConfig, name="head", argv=["--http-tls-cert", "x"], environ={}, default_file=tmp_path / "none")


def test_a_certificate_that_only_openssl_can_read_is_served_and_its_end_not_told(site, tmp_path):
    site()
    text = (tmp_path / "cert.pem").read_bytes()
    (tmp_path / "cert.pem").write_bytes(
        text.replace(b"BEGIN CERT", b"BEGIN X509 CERT").replace(b"END CERT", b"END X509 CERT")
    )
    assert https_files(*site.files).expires_unix_s is None
