"""The shipped units as systemd sees them: no complaint, and little left open, each of it explained."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.sollol_command import sollol

SHIPPED = Path(__file__).parents[1] / "systemd"
SYSTEM_UNITS = sorted(path.name for path in SHIPPED.glob("*.service"))
EXPOSURE_AT_MOST = {"sollold.service": 1.5, "sollol-agent.service": 2.0, "sollol-engines.service": 1.0}
PORTS = range(7460, 7463), range(7500, 7700), range(18_080, 18_144)


@pytest.fixture
async def installed(tmp_path):
    status, _, err = await sollol("systemd", "install", "--head", "--agent", "--prefix", str(tmp_path))
    assert (status, err) == (0, "")
    return tmp_path / "etc/systemd/system"


def analyze(*words, environ=None):
    return subprocess.run(
        ("systemd-analyze", *words), capture_output=True, text=True, timeout=60, check=False, env=environ
    )


async def test_systemd_has_nothing_to_say_about_the_installed_units(installed):
    done = analyze("verify", *(str(installed / unit) for unit in SYSTEM_UNITS))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_systemd_has_nothing_to_say_about_the_units_of_one_user(tmp_path):
    environ = {"XDG_CONFIG_HOME": "/home/me/.config", "HOME": "/home/me", "PATH": "/usr/bin:/bin"}
    status, _, err = await sollol(
        "systemd", "install", "--user", "--head", "--agent", "--prefix", str(tmp_path), env=environ
    )
    assert (status, err) == (0, "")

    units = sorted((tmp_path / "home/me/.config/systemd/user").glob("*.service"))
    done = analyze("verify", "--user", *map(str, units), environ={**environ, "XDG_RUNTIME_DIR": str(tmp_path)})

    assert [unit.name for unit in units] == SYSTEM_UNITS
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", SYSTEM_UNITS)
async def test_a_unit_is_open_to_little(installed, unit):
    done = analyze("security", "--offline=yes", "--no-pager", str(installed / unit))

    exposure = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1])
    assert exposure <= EXPOSURE_AT_MOST[unit], done.stdout


@pytest.mark.parametrize("unit", SYSTEM_UNITS)
async def test_whatever_a_unit_leaves_open_is_explained_in_it(installed, unit):
    done = analyze("security", "--offline=yes", "--json=short", str(installed / unit))
    text = (installed / unit).read_text()
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))

    open_ones = [finding["name"] for finding in json.loads(done.stdout) if not finding["set"] and finding["exposure"]]
    words = {re.search(r"@\w+|AF_\w+(?<!_)|\w+", name.rpartition("~")[2])[0] for name in open_ones}

    assert words, "an analysis that finds nothing is none"
    assert {word for word in words if word not in comments} == set()


def test_all_of_our_ports_are_reserved_and_no_other():
    (line,) = re.findall(r"(?m)^net\.ipv4\.ip_local_reserved_ports = (.*)$", (SHIPPED / "sollol.sysctl").read_text())
    reserved = {
        port for part in line.split(",") for port in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    }

    assert reserved == {port for ports in PORTS for port in ports}


@pytest.mark.parametrize("unit", SYSTEM_UNITS)
def test_the_units_of_one_user_start_as_the_systems_do(unit):
    """Confinement and directories differ, not how it starts, reloads, is watched and ends."""
    shared = re.compile(
        r"(?m)^(Type|WatchdogSec|Timeout\w+|ExecReload|Restart\w*|KillMode|StartLimit\w+|PartOf|Delegate|OOMPolicy|RemainAfterExit)=.*$"
    )

    def ways(path):
        return sorted(found[0] for found in shared.finditer(path.read_text()))

    assert ways(SHIPPED / unit) == ways(SHIPPED / "user" / unit)
