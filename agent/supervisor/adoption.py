"""What an earlier agent left running: what can be taken up again, and what nobody can account for."""

from collections.abc import Iterator, Mapping

import structlog
from msgspec import Struct
from sollol.report import InstanceKind

from agent.supervisor import records
from agent.supervisor.files import Directories, files_of
from agent.supervisor.identity import with_mark
from agent.supervisor.lending import forwarder_id
from agent.supervisor.process import EngineProcess, find_running
from agent.supervisor.records import ENGINE, FORWARDER, Record
from agent.supervisor.tunnelling import tunnel_id

log = structlog.get_logger(__name__)

_NEEDED = {InstanceKind.COORDINATOR: (ENGINE,), InstanceKind.BACKEND: (ENGINE, FORWARDER)}


class Found(Struct, frozen=True, kw_only=True):
    """An instance with a record, and those of its processes that run. `problem` says why it cannot be taken up."""

    record: Record
    running: dict[str, EngineProcess]
    problem: str


def found_in(directories: Directories) -> Iterator[Found]:
    """Every instance of which something runs still. What is left of others is removed."""
    for path, record in records.read_all(directories.instances):
        if path != files_of(record.instance_id, directories).state:
            log.warning("instance_file_misplaced", path=str(path), instance=record.instance_id)
            continue  # somebody's copy: its processes are another record's, or nobody's
        running = {role: process for role, who in record.processes.items() if (process := find_running(who))}
        if running:
            yield Found(record=record, running=running, problem=problem_of(record, running))
        else:
            log.info("instance_ended_meanwhile", instance=record.instance_id)
            forget(record, directories)


def problem_of(record: Record, running: Mapping[str, object]) -> str:
    """Why an instance cannot be taken up; empty when it can be."""
    roles = dict.fromkeys((*_NEEDED[record.kind], *record.processes))
    missing = [role for role in roles if role not in running]
    if not missing:
        return ""
    return f"its {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there"


def unrecorded(directories: Directories, known: set[int]) -> dict[int, EngineProcess]:
    """Processes that carry our mark and are not among `known` pids."""
    strangers = {who.pid: find_running(who) for who in with_mark(directories.state) if who.pid not in known}
    return {pid: process for pid, process in strangers.items() if process is not None}


def forget(record: Record, directories: Directories) -> None:
    """Remove the files of an instance that is gone."""
    beside = tunnel_id if record.kind is InstanceKind.COORDINATOR else forwarder_id
    for name in (record.instance_id, beside(record.pool_id)):
        files = files_of(name, directories)
        files.remove_run_files()
        files.state.unlink(missing_ok=True)
