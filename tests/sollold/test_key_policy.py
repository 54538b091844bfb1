import pytest
from sollol.config import ConfigError
from structlog.testing import capture_logs

from sollold.config import HeadConfig
from sollold.key_policy import check_keys, key_mode


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "auto"),
        ({"listen": "0.0.0.0"}, "always"),
        ({"listen": "0.0.0.0", "insecure": True}, "auto"),
        ({"listen": "0.0.0.0", "insecure": True, "require_keys": "always"}, "always"),
        ({"require_keys": "always"}, "always"),
        ({"require_keys": "never"}, "never"),
    ],
)
def test_keys_are_needed_off_loopback_and_on_it_once_there_is_one(settings, mode):
    assert key_mode(HeadConfig(**settings)) == mode


@pytest.mark.parametrize("settings", [{}, {"require_keys": "never"}])
def test_off_loopback_a_head_without_keys_does_not_start(path, settings):
    config = HeadConfig(listen="0.0.0.0", **settings)
    with pytest.raises(ConfigError, match=r"listen = .*sollol keys add"):
        check_keys(config, path)
    path.touch()
    if not settings:
        check_keys(config, path)


def test_on_loopback_or_in_a_network_that_somebody_trusts_it_does_and_says_so(path):
    with capture_logs() as lines:
        check_keys(HeadConfig(), path)
        assert lines == []
        check_keys(HeadConfig(listen="0.0.0.0", insecure=True), path)
    assert [(line["event"], line["log_level"]) for line in lines] == [("http_open_to_everybody", "warning")]
