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


@pytest.mark.parametrize("listen", ["127.0.0.1", "192.168.1.10"])
def test_a_head_that_cannot_tell_whether_there_are_keys_does_not_start(tmp_path, listen):
    nowhere = tmp_path / ("x" * 300)  # no file system takes such a name

    with pytest.raises(ConfigError, match=r"cannot be told .*keys_file"):
        check_keys(HeadConfig(listen=listen, host="192.168.1.10"), nowhere)


def test_on_loopback_or_in_a_network_that_somebody_trusts_it_does_and_says_so(path):
    with capture_logs() as lines:
        check_keys(HeadConfig(), path)
        assert lines == []
        check_keys(HeadConfig(listen="0.0.0.0", insecure=True), path)
    assert [(line["event"], line["log_level"]) for line in lines] == [("http_open_to_everybody", "warning")]


@pytest.mark.parametrize(
    ("settings", "key", "warned"),
    [
        ({"mqtt_url": "mqtt://u:secret@192.168.1.5"}, False, True),
        ({"mqtt_url": "mqtt://192.168.1.5", "require_keys": "never"}, True, True),
        ({"mqtt_url": "mqtt://192.168.1.5"}, True, False),
        ({"mqtt_url": "mqtt://192.168.1.5", "require_keys": "always"}, False, False),
        ({"mqtt_url": "mqtt://192.168.1.5", "mqtt_inference": False}, False, False),
        ({"mqtt_url": "mqtt://127.0.0.1"}, False, False),
    ],
)
def test_requests_through_another_machines_broker_that_need_no_key_are_warned_of(path, settings, key, warned):
    if key:
        path.touch()
    with capture_logs() as lines:
        check_keys(HeadConfig(**{"mqtt_inference": True, **settings}), path)
    assert [line["event"] for line in lines] == ["mqtt_open_to_whoever_may_publish"] * warned
    assert "secret" not in str(lines)
