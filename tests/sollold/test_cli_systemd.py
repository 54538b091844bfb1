"""`sollol systemd`: staged below a directory, as packagers do; for real in tests/nspawn."""

import asyncio
import sys
from pathlib import Path

import pytest
from sollol.errors import SollolError

from sollold.cli import systemd
from sollold.cli.units import Site, for_this_machine, is_plain, version_in
from tests.sollol_command import sollol

SHIPPED = Path(__file__).parents[2] / "systemd"


def site(interpreter="/opt/sollol/bin/python", *, home=False):
    return Site(shipped=SHIPPED, root=Path("/"), interpreter=Path(interpreter), home=home)


@pytest.mark.parametrize("configuration", [None, Path("/c")], ids=["the system's", "a user's"])
@pytest.mark.parametrize("version", [254, 257])
def test_where_systemd_knows_how_the_agent_gets_a_cgroup_beside_its_engines_it_does_so(version, configuration):
    text = agent_unit(Site(SHIPPED, Path("/"), Path("/p"), configuration, systemd=version))

    assert "\nDelegate=yes\nDelegateSubgroup=agent\n" in text
    assert "\nExecStart=/p -P -m agent" in text
    assert "\nExecStopPost" not in text
    assert " exec " not in text


@pytest.mark.parametrize("configuration", [None, Path("/c")], ids=["the system's", "a user's"])
@pytest.mark.parametrize("version", [0, 252, 253])
def test_an_older_or_unknown_systemd_gets_no_setting_that_it_complains_about(version, configuration):
    text = agent_unit(Site(SHIPPED, Path("/"), Path("/p"), configuration, systemd=version))

    assert "\nDelegate=yes\n" in text
    assert "\nDelegateSubgroup" not in text
    (start,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert "; exec /p -P -m agent" in start
    (after,) = [line for line in text.splitlines() if line.startswith("ExecStopPost=")]
    assert "echo -memory >$own/cgroup.subtree_control" in after


def agent_unit(site):
    folder = SHIPPED / "user" if site.configuration else SHIPPED
    return for_this_machine((folder / "sollol-agent.service").read_text(), site)


@pytest.mark.parametrize("unit", ["sollold.service", "sollol-engines.service"])
def test_the_other_units_are_the_same_for_every_systemd(unit):
    shipped = (SHIPPED / unit).read_text()

    assert for_this_machine(shipped, Site(SHIPPED, Path("/"), Path("/p"), systemd=257)) == for_this_machine(
        shipped, site("/p")
    )


def test_systemds_version_is_read_from_what_it_prints():
    assert version_in("systemd 252 (252.39-1~deb12u1)\n+PAM +AUDIT\n") == 252
    assert version_in("systemd 257 (257~rc1)") == 257
    assert version_in("") == version_in("System has not been booted with systemd\n") == 0


def files_below(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def installed(root, *words):
    return await sollol("systemd", "install", *words, "--prefix", str(root))


async def test_each_daemon_gets_its_own_units_and_both_the_same_user_directories_and_ports(tmp_path):
    await installed(tmp_path / "head", "--head")
    await installed(tmp_path / "agent", "--agent")

    common = {"etc/sysusers.d/sollol.conf", "etc/tmpfiles.d/sollol.conf", "etc/sysctl.d/60-sollol.conf"}
    assert files_below(tmp_path / "head") == common | {"etc/systemd/system/sollold.service", "etc/sollol/head.toml"}
    assert files_below(tmp_path / "agent") == common | {
        "etc/systemd/system/sollol-agent.service",
        "etc/systemd/system/sollol-engines.service",
        "etc/sollol/agent.toml",
    }


async def test_the_units_start_the_interpreter_that_installed_them(tmp_path):
    _, out, _ = await installed(tmp_path, "--head", "--agent")

    units = tmp_path / "etc/systemd/system"
    assert f"\nExecStart={sys.executable} -P -m sollold\n" in (units / "sollold.service").read_text()
    assert f"; exec {sys.executable} -P -m agent'\n" in (units / "sollol-agent.service").read_text()
    assert f"|| exec {sys.executable} -P -m agent --end-engines'\n" in (units / "sollol-engines.service").read_text()
    assert "systemctl enable --now sollold sollol-agent\n" in out


async def test_installing_again_changes_nothing_and_keeps_the_settings_that_were_edited(tmp_path):
    await installed(tmp_path, "--agent")
    settings = tmp_path / "etc/sollol/agent.toml"
    settings.write_text("port = 1\n")
    (tmp_path / "etc/systemd/system/sollol-engines.service").write_text("of an older version\n")

    status, out, _ = await installed(tmp_path, "--agent")

    assert status == 0
    assert settings.read_text() == "port = 1\n"
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()] == [
        *["unchanged"] * 3,
        "wrote",
        "unchanged",
        "kept",
    ]
    assert "older" not in (tmp_path / "etc/systemd/system/sollol-engines.service").read_text()


async def test_settings_are_not_for_everybodys_eyes(tmp_path):
    await installed(tmp_path, "--agent")

    assert (tmp_path / "etc/sollol/agent.toml").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "etc/systemd/system/sollol-agent.service").stat().st_mode & 0o777 == 0o644


async def test_uninstalling_takes_what_was_installed_and_leaves_the_settings(tmp_path):
    await installed(tmp_path, "--head", "--agent")

    assert (await sollol("systemd", "uninstall", "--head", "--prefix", str(tmp_path)))[0] == 0
    left = files_below(tmp_path)
    assert "etc/systemd/system/sollold.service" not in left
    assert {"etc/systemd/system/sollol-agent.service", "etc/sysusers.d/sollol.conf"} <= left

    await sollol("systemd", "uninstall", "--prefix", str(tmp_path))
    assert files_below(tmp_path) == {"etc/sollol/head.toml", "etc/sollol/agent.toml"}
    assert await sollol("systemd", "uninstall", "--prefix", str(tmp_path)) == (0, "", "")


async def test_a_user_gets_units_and_settings_in_their_configuration_directory(tmp_path):
    environ = {"XDG_CONFIG_HOME": "/home/me/.config", "HOME": "/home/me"}

    _, out, _ = await sollol("systemd", "install", "--user", "--agent", "--prefix", str(tmp_path), env=environ)

    assert files_below(tmp_path) == {
        "home/me/.config/systemd/user/sollol-agent.service",
        "home/me/.config/systemd/user/sollol-engines.service",
        "home/me/.config/sollol/agent.toml",
    }
    text = (tmp_path / "home/me/.config/systemd/user/sollol-agent.service").read_text()
    assert f"; exec {sys.executable} -P -m agent --config %E/sollol/agent.toml'\n" in text
    assert "User=" not in text
    assert "systemctl --user enable --now sollol-agent\n" in out
    assert "enable-linger" in out


async def test_which_daemon_must_be_said(tmp_path):
    status, out, err = await installed(tmp_path)

    assert (status, out) == (2, "")
    assert "--head, --agent, or both" in err
    assert files_below(tmp_path) == set()


def test_a_service_whose_user_cannot_reach_the_interpreter_is_refused_before_it_is_written(tmp_path):
    closed = tmp_path / "mine"
    (closed / "bin").mkdir(parents=True)
    closed.chmod(0o700)

    with pytest.raises(SollolError, match=f"could not reach {closed}/bin/python: .* is closed to others"):
        systemd._check_reach([closed / "bin/python"])


@pytest.mark.parametrize("path", ["/opt/my venv/bin/python", "/opt/100%/python", "/opt/$x/python", "/opt/a'b/python"])
def test_a_path_that_a_unit_cannot_hold_as_it_stands_is_not_plain(path):
    assert not is_plain(Path(path))
    assert is_plain(Path("/opt/sollol-1.0+git@x/bin/python3.11"))


async def test_an_interpreter_at_such_a_path_is_refused(tmp_path):
    linked = tmp_path / "my venv" / "python"
    linked.parent.mkdir()
    linked.symlink_to(sys.executable)
    environ = {"PYTHONPATH": ":".join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        *(linked, "-m", "sollold.cli", "systemd", "install", "--head", "--prefix", tmp_path / "root"),
        stderr=asyncio.subprocess.PIPE,
        env=environ,
    )
    _, err = await process.communicate()

    assert process.returncode == 2
    assert "install sollol elsewhere" in err.decode()
    assert not (tmp_path / "root").exists()


def test_an_interpreter_in_a_home_opens_homes_for_reading():
    text = (SHIPPED / "sollold.service").read_text()

    assert "\nProtectHome=yes\n" in for_this_machine(text, site())
    assert "\nProtectHome=read-only\n" in for_this_machine(text, site(home=True))
