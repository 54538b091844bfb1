"""Settings and certificate decide how RPC bytes travel; plain text off loopback is said."""

from pathlib import Path

import pytest
from sollol.report import RpcTransport
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from agent.config import AgentConfig
from agent.lending_site import lending_site
from tests.certificates import authority, write_identity

OFF_LOOPBACK = {"listen": "192.0.2.1", "insecure": True}


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return TlsFiles(write_identity(tmp_path / "pki", authority(), "agent", "n1"))


def test_a_certificate_makes_tunnels(tls: TlsFiles) -> None:
    with capture_logs() as logs:
        site = lending_site(AgentConfig(node_id="n1", **OFF_LOOPBACK), None, tls)
    assert (site.transport, site.tls_dir, logs) == (RpcTransport.TUNNEL, tls.directory, [])


def test_direct_is_direct_whatever_certificates_there_are(tls: TlsFiles) -> None:
    with capture_logs() as logs:
        site = lending_site(AgentConfig(rpc_transport="direct", **OFF_LOOPBACK), None, tls)
    assert site.transport is RpcTransport.DIRECT
    assert [line["event"] for line in logs] == ["rpc_bytes_in_plain_text"]


def test_without_a_certificate_bytes_go_plainly_and_off_loopback_that_is_said() -> None:
    for settings, said in (({}, []), (OFF_LOOPBACK, ["rpc_bytes_in_plain_text"])):
        with capture_logs() as logs:
            site = lending_site(AgentConfig(**settings), None, None)
        assert (site.transport, [line["event"] for line in logs]) == (RpcTransport.DIRECT, said)
