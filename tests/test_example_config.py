"""The shipped examples list every setting with its default and a comment, and the daemons accept them."""

import re
import tomllib
from pathlib import Path

import pytest
from msgspec.structs import fields
from sollol.config import load
from sollol.config_text import default, description, expected, toml_value

from agent.config import AgentConfig
from sollold.config import HeadConfig

EXAMPLES = Path(__file__).parents[1] / "systemd"
DAEMONS = [pytest.param(AgentConfig, "agent", id="agent"), pytest.param(HeadConfig, "head", id="head")]
NOT_THIS_HOSTS = {"node_id"}  # its default is the host's name


def uncommented(name: str) -> str:
    return re.sub(r"(?m)^# (\w+ = )", r"\1", (EXAMPLES / f"{name}.toml").read_text())


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_example_lists_every_setting_with_its_default_in_the_order_of_the_class(kind, name):
    listed = tomllib.loads(uncommented(name))
    assert list(listed) == list(kind.__struct_fields__)
    for info in fields(kind):
        if info.name not in NOT_THIS_HOSTS:
            assert toml_value(listed[info.name]) == toml_value(default(info)), info.name


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_example_describes_every_setting_as_help_does(kind, name):
    lines = (EXAMPLES / f"{name}.toml").read_text().splitlines()
    for info in fields(kind):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"# {info.name} = "))
        assert lines[at - 1] == f"# {description(info.type)} ({expected(info.type)})."


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_daemon_accepts_its_example_as_it_is_and_uncommented(kind, name, tmp_path):
    for text in ((EXAMPLES / f"{name}.toml").read_text(), uncommented(name)):
        file = tmp_path / f"{name}.toml"
        file.write_text(text)
        value = load(kind, name=name, argv=["--config", str(file)], environ={}, default_file=file).value
        same = [info.name for info in fields(kind) if info.name not in NOT_THIS_HOSTS]
        assert [getattr(value, item) for item in same] == [getattr(kind(), item) for item in same]
