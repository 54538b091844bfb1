"""Instances as reports show them: what each runs, and what it has to do."""

from msgspec.structs import replace
from sollol.report import Instance

from agent.speeds import Speeds
from agent.streams import Streams
from agent.supervisor.supervisor import Supervisor


class Busy:
    """The supervisor's instances, each with the streams that the relay carries for it, and its speed."""

    def __init__(self, supervisor: Supervisor, streams: Streams, speeds: Speeds) -> None:
        self._supervisor = supervisor
        self._streams = streams
        self._speeds = speeds

    def instances(self) -> tuple[Instance, ...]:
        return tuple(
            replace(
                instance,
                active_streams=self._streams.active(instance.instance_id),
                observed_ms_per_token=self._speeds.observed_ms(instance.instance_id),
            )
            for instance in self._supervisor.instances()
        )
