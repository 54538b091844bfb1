import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError

from agent.forwarder.status import Status, StatusFile
from agent.supervisor.files import KEPT_LOGS, Directories, files_of, keep_short, last_lines, remove_oldest_logs

SOMEWHERE = Directories(log=Path("/log"), run=Path("/run"), state=Path("/state"))


# As checked at the door: `str.isprintable`.
PRINTABLE = st.characters(exclude_categories=["C", "Z"], include_characters=" ")


@given(st.text(PRINTABLE, max_size=300))
def test_no_id_leaves_its_directories(instance_id: str) -> None:
    files = files_of(instance_id, SOMEWHERE)
    assert files.log.parent == SOMEWHERE.log
    assert files.state.parent == SOMEWHERE.instances
    assert {files.socket.parent, files.stdin.parent, files.progress.parent} == {SOMEWHERE.run}
    assert len(files.log.name.encode()) < 100
    assert ".." not in files.log.parts


def test_a_usual_id_names_its_log() -> None:
    assert files_of("llama3.1-70b-5f0c1a2b", SOMEWHERE).log == Path("/log/llama3.1-70b-5f0c1a2b.log")


def test_a_socket_path_that_the_kernel_would_not_take_is_refused_with_its_length() -> None:
    deep = Directories(log=Path("/log"), run=Path("/" + "r" * 100), state=Path("/state"))
    with pytest.raises(SollolError) as refused:
        files_of("p", deep)
    assert refused.value.refusal.reason is Reason.ENGINE_START_FAILED
    assert refused.value.refusal.numbers == {"path_bytes": 119, "limit_bytes": 107}


def test_of_one_that_is_killed_while_it_tells_how_it_is_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Directories(log=tmp_path / "log", run=tmp_path / "run", state=tmp_path / "state")
    where.create()
    files = files_of("p", where)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            StatusFile(files.status).write(Status(port=7600))
    assert list(where.run.iterdir())
    files.remove_run_files()
    assert not list(where.run.iterdir())


def test_the_last_lines_of_a_long_log_are_read_without_reading_it_all(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {number}\n\n" for number in range(100_000)))
    assert last_lines(log, 2) == ("line 99998", "line 99999")


def test_a_log_with_bytes_that_are_no_text_is_read_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"\xff\xfe broken\nlast")
    assert last_lines(log, 5)[-1] == "last"


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none.log", 5) == ()


def test_the_oldest_logs_go_but_never_one_of_a_running_engine(tmp_path: Path) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(KEPT_LOGS + 10)]
    for age, path in enumerate(reversed(logs)):
        path.write_text("x")
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    remove_oldest_logs(tmp_path, keep=[logs[0]])
    assert sorted(tmp_path.glob("*.log")) == sorted([logs[0], *logs[-KEPT_LOGS:]])


def test_a_log_that_is_gone_while_the_oldest_are_looked_for_disturbs_nobody(tmp_path: Path) -> None:
    (tmp_path / "gone.log").symlink_to(tmp_path / "nowhere")
    remove_oldest_logs(tmp_path, keep=[])


def test_a_long_log_starts_anew_with_its_last_lines_and_its_writer_goes_on_behind_them(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with log.open("ab", buffering=0) as engine:
        engine.write(b"".join(b"line %d\n" % number for number in range(100_000)))
        before = log.stat().st_size
        keep_short(log, before)
        assert log.stat().st_size == before
        keep_short(log, before - 1)
        engine.write(b"and on\n")
    first, second, *_, last_but_one, last = log.read_bytes().splitlines()
    assert first == b"(more than %d bytes: started anew with its last lines)" % (before - 1)
    assert (second[:5], last_but_one, last) == (b"line ", b"line 99999", b"and on")
    assert log.stat().st_size < 70_000


def test_a_log_that_is_not_there_is_short(tmp_path: Path) -> None:
    keep_short(tmp_path / "none.log", 1)
    assert not list(tmp_path.iterdir())
