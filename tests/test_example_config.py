"""The shipped examples list every setting and option with its default and a comment, and the daemons accept them."""

import re
import tomllib
from pathlib import Path

import pytest
from msgspec.structs import fields, replace
from sollol.config import load
from sollol.config_text import default, description, expected, options_of, toml_value
from sollol.report import PlacementWish

from agent.config import LIVE as LIVE_IN_AGENT
from agent.config import AgentConfig
from sollold.config import LIVE as LIVE_IN_HEAD
from sollold.config import HeadConfig
from sollold.options import EVERY_MODEL, ModelOptions, Options
from sollold.placement import PlacementDefaults
from sollold.placement.job import job_for

EXAMPLES = Path(__file__).parents[1] / "systemd"
DAEMONS = [pytest.param(AgentConfig, "agent", id="agent"), pytest.param(HeadConfig, "head", id="head")]
NOT_THIS_HOSTS = {"node_id"}  # its default is the host's name
TABLES = {info.name for kind in (AgentConfig, HeadConfig) for info in fields(kind) if options_of(info.type)}


def uncommented(name: str) -> str:
    return re.sub(r"(?m)^# (\w+ = |\[\w+\.\w+\]$)", r"\1", (EXAMPLES / f"{name}.toml").read_text())


def described(name: str, key: str) -> str:
    """The line above the one that sets or opens `key`, which comes once."""
    lines = (EXAMPLES / f"{name}.toml").read_text().splitlines()
    return lines[next(at for at, line in enumerate(lines) if line.startswith((f"# {key} = ", f"# [{key}."))) - 1]


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_example_lists_every_setting_with_its_default_in_the_order_of_the_class(kind, name):
    listed = tomllib.loads(uncommented(name))
    assert list(listed) == list(kind.__struct_fields__)
    for info in fields(kind):
        if info.name not in NOT_THIS_HOSTS | TABLES:
            assert toml_value(listed[info.name]) == toml_value(default(info)), info.name


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_example_describes_every_setting_as_help_does(kind, name):
    for info in fields(kind):
        if info.name not in TABLES:
            assert described(name, info.name) == f"# {description(info.type)} ({expected(info.type)})."


@pytest.mark.parametrize(
    ("kind", "name", "live"), [(AgentConfig, "agent", LIVE_IN_AGENT), (HeadConfig, "head", LIVE_IN_HEAD)]
)
def test_the_example_says_which_settings_a_reload_changes(kind, name, live):
    (listed,) = re.findall(r"while everything runs: ([^.]*)\.", (EXAMPLES / f"{name}.toml").read_text())
    assert listed.replace("#", "").split() == sorted(live)
    assert live <= set(kind.__struct_fields__)


def test_the_example_lists_and_describes_every_option_of_a_model():
    listed = tomllib.loads(uncommented("head"))["models"]
    assert list(listed) == [EVERY_MODEL]
    assert list(listed[EVERY_MODEL]) == list(ModelOptions.__struct_fields__)
    text = (EXAMPLES / "head.toml").read_text()
    (models,) = (info for info in fields(HeadConfig) if info.name == "models")
    assert f"# {description(models.type)} (" in text
    for info in fields(ModelOptions):
        assert f"# {description(info.type)} ({expected(info.type)}).\n# {info.name} = " in text


def test_the_options_in_the_example_are_what_a_head_does_without_them(tmp_path):
    """But for the number of backends, which has no such value."""
    tables = loaded(HeadConfig, "head", uncommented("head"), tmp_path).models
    options = Options({EVERY_MODEL: replace(tables[EVERY_MODEL], backends_per_pool=None)}, known=lambda _: None)
    wish = PlacementWish(model="m")

    assert job_for(options.complete(wish), PlacementDefaults()) == job_for(wish, PlacementDefaults())
    assert options.pools("m") == Options({}, known=lambda _: None).pools("m")


@pytest.mark.parametrize(("kind", "name"), DAEMONS)
def test_the_daemon_accepts_its_example_as_it_is_and_uncommented(kind, name, tmp_path):
    for text in ((EXAMPLES / f"{name}.toml").read_text(), uncommented(name)):
        value = loaded(kind, name, text, tmp_path)
        same = [info.name for info in fields(kind) if info.name not in NOT_THIS_HOSTS | TABLES]
        assert [getattr(value, item) for item in same] == [getattr(kind(), item) for item in same]


def loaded(kind, name, text, directory):
    file = directory / f"{name}.toml"
    file.write_text(text)
    return load(kind, name=name, argv=["--config", str(file)], environ={}, default_file=file).value
