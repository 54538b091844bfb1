"""What a daemon does about its certificate: which one it takes, what it says without one, and when it warns."""

import pytest
from sollol.certified import certified, watch_expiry
from sollol.config import ConfigError, check_listen
from sollol.errors import Reason, SollolError
from sollol.identity import Role
from sollol.lifecycle import Closing, Stop
from sollol.pki_directories import tls_directory, users_tls_directory
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from agent.config import AgentConfig
from tests.certificates import authority, write_identity

DAY_S = 86_400


async def taken(config, environ):
    async with Closing() as closing:
        return certified(config, Role.AGENT, environ, closing, Stop())


@pytest.fixture
def ours():
    return authority()


def test_the_machines_certificate_comes_before_the_users_and_an_empty_setting_means_none(tmp_path):
    environ, system = {"XDG_CONFIG_HOME": str(tmp_path / "user")}, tmp_path / "system"
    assert tls_directory("auto", Role.AGENT, environ, system=system) is None
    users = tmp_path / "user" / "sollol" / "pki" / "agent"
    users.mkdir(parents=True)
    assert tls_directory("auto", Role.AGENT, environ, system=system) == users
    (system / "agent").mkdir(parents=True)
    assert tls_directory("auto", Role.AGENT, environ, system=system) == system / "agent"
    assert tls_directory("auto", Role.HEAD, environ, system=system) is None
    assert tls_directory("", Role.AGENT, environ, system=system) is None
    assert str(tls_directory("/x", Role.AGENT, environ, system=system)) == "/x"


def test_people_use_what_they_can_read_an_operators_first(tmp_path, ours):
    environ, system = {"XDG_CONFIG_HOME": str(tmp_path / "user")}, tmp_path / "system"
    client = write_identity(tmp_path / "user" / "sollol" / "pki" / "client", ours, "client", "me")
    (system / "admin").mkdir(parents=True)
    assert users_tls_directory("auto", environ, system=system) == client
    admin = write_identity(system / "admin", ours, "admin", "root")
    assert users_tls_directory("auto", environ, system=system) == admin
    assert users_tls_directory("", environ, system=system) is None


async def test_a_daemon_takes_its_own_certificate_and_no_other(tmp_path, ours):
    directory = str(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    tls = await taken(AgentConfig(node_id="n1", tls_dir=directory), {})
    assert tls.identity.node_id == "n1"
    head = str(write_identity(tmp_path / "h", ours, "head", "n1"))
    for config, reason in (
        (AgentConfig(node_id="n2", tls_dir=directory), Reason.WRONG_NODE),
        (AgentConfig(node_id="n1", tls_dir=head), Reason.WRONG_ROLE),
        (AgentConfig(node_id="n1", tls_dir=str(tmp_path / "nothing")), Reason.CERTIFICATE_UNREADABLE),
    ):
        with pytest.raises(SollolError) as raised:
            await taken(config, {})
        assert raised.value.refusal.reason is reason


async def test_without_certificates_loopback_is_fine_and_everything_else_is_said_aloud(tmp_path):
    environ = {"HOME": str(tmp_path)}
    with capture_logs() as logs:
        assert await taken(AgentConfig(tls_dir=""), environ) is None
    assert logs == []
    with capture_logs() as logs:
        assert await taken(AgentConfig(tls_dir="", listen="0.0.0.0", insecure=True), environ) is None
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("INSECURE", "warning")]


def test_off_loopback_it_takes_a_certificate_or_a_human_who_says_insecure():
    check_listen("0.0.0.0", insecure=False, tls=True)
    check_listen("0.0.0.0", insecure=True)
    with pytest.raises(ConfigError, match="there is no TLS"):
        check_listen("0.0.0.0", insecure=False)


class NoMoreLooksError(Exception):
    pass


async def test_the_last_fifth_of_a_certificates_life_is_warned_of_once_a_day(tmp_path, ours):
    files = TlsFiles(write_identity(tmp_path, ours, "agent", "n1", days=10))
    certificate = files.current().certificate
    end_s = certificate.not_after_s
    fifth_s = end_s - 0.2 * (end_s - certificate.not_before_s)
    looks = {
        certificate.not_before_s: False,
        fifth_s - 60: False,
        fifth_s + 60: True,
        fifth_s + 120: False,
        fifth_s + 59 + DAY_S: False,
        fifth_s + 60 + DAY_S: True,
        end_s + 1: True,
        end_s + 2: False,
    }
    left = list(looks)

    def clock():
        if not left:
            raise NoMoreLooksError
        return left.pop(0)

    with capture_logs() as logs, pytest.raises(NoMoreLooksError):
        await watch_expiry(files, clock=clock, every_s=0)

    warnings = [entry["expires_in_s"] for entry in logs if entry["event"] == "certificate_ends"]
    assert warnings == [round(end_s - now_s) for now_s, warned in looks.items() if warned]
