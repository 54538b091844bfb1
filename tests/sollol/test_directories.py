import os
import stat

import pytest
from sollol.config import ConfigError
from sollol.directories import cache_directory, directories, private, runtime_directory


def test_systemds_directories_win_and_the_first_of_several_is_taken(tmp_path):
    environ = {
        "STATE_DIRECTORY": f"{tmp_path}/state:{tmp_path}/other",
        "LOGS_DIRECTORY": f"{tmp_path}/log",
        "RUNTIME_DIRECTORY": f"{tmp_path}/run",
        "HOME": "/nonexistent",
    }
    found = directories(environ)
    assert (found.state, found.log, found.run) == (tmp_path / "state", tmp_path / "log", tmp_path / "run")
    assert found.state.is_dir()


def test_a_configured_directory_wins_over_systemds(tmp_path):
    found = directories(
        {"STATE_DIRECTORY": "/nonexistent", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        state=str(tmp_path / "mine"),
    )
    assert found.state == tmp_path / "mine"


def test_a_user_gets_private_xdg_directories(tmp_path):
    found = directories({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert found.state == tmp_path / ".local/state/sollol"
    assert found.log == tmp_path / ".local/state/sollol/log"
    assert found.run == tmp_path / "sollol"
    assert stat.S_IMODE(found.run.stat().st_mode) == 0o700


def test_without_a_runtime_directory_a_private_one_in_tmp_is_used(tmp_path):
    for environ in ({}, {"XDG_RUNTIME_DIR": "/nonexistent"}, {"XDG_RUNTIME_DIR": "relative"}):
        assert runtime_directory(environ, temporary=tmp_path) == tmp_path / f"sollol-{os.getuid()}"


def test_a_directory_that_others_can_write_to_or_a_link_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(ConfigError, match="run_dir"):
            private(tmp_path / name)


def test_a_directory_that_cannot_be_made_is_refused_by_its_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"log_dir = .*file/log: cannot be made"):
        directories({"HOME": str(tmp_path)}, log=str(tmp_path / "file" / "log"))


def test_the_cache_follows_xdg(tmp_path):
    assert cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "sollol"
    assert cache_directory({"HOME": str(tmp_path)}) == tmp_path / ".cache/sollol"
