import pytest
from msgspec import Struct
from sollol.config import ConfigError
from sollol.live import Live


class Settings(Struct, frozen=True):
    log_level: str = "info"
    port: int = 1
    redis_url: str = "redis://:old-secret@h"


def live(*rereads):
    """Settings that are read as `rereads` say, one after the other; and what listeners heard."""
    readings = iter(rereads)

    def reread():
        reading = next(readings)
        if isinstance(reading, Exception):
            raise reading
        return reading

    settings = Live(Settings(), reread=reread, changeable=frozenset({"log_level"}))
    heard = []
    settings.subscribe(heard.append)
    return settings, heard


def test_what_can_change_live_is_in_force_and_told():
    settings, heard = live(Settings(log_level="debug"))

    settings.reload()

    assert settings.now == Settings(log_level="debug")
    assert heard == [settings.now]


def test_what_needs_a_restart_stays_and_is_said_by_name_without_its_value(capfd):
    settings, _ = live(Settings(port=2, redis_url="redis://:new-secret@h", log_level="debug"))

    settings.reload()

    assert settings.now == Settings(log_level="debug")
    out = capfd.readouterr().out
    assert "settings_need_restart" in out
    assert "redis_url" in out
    assert "secret" not in out


def test_it_is_said_again_as_long_as_the_restart_is_missing(capfd):
    settings, heard = live(Settings(port=2), Settings(port=2))

    settings.reload()
    settings.reload()

    assert capfd.readouterr().out.count("settings_need_restart") == 2
    assert heard == [], "nothing in force has changed"


def test_wrong_settings_change_nothing():
    settings, heard = live(ConfigError("file x line 3: no such setting"), Settings(log_level="debug"))

    with pytest.raises(ConfigError):
        settings.reload()
    assert (settings.now, heard) == (Settings(), [])

    settings.reload()
    assert settings.now.log_level == "debug", "the next one is tried as if nothing had been"
