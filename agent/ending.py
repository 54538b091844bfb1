"""What `sollol-agent --end-engines` does instead of serving."""

from collections.abc import Mapping

import structlog
from sollol.directories import directories

from agent.config import AgentConfig
from agent.sole import sole_owner
from agent.supervisor.files import Directories
from agent.supervisor.orphans import end_everything

log = structlog.get_logger(__name__)


async def end_engines(config: AgentConfig, environ: Mapping[str, str]) -> None:
    """End every engine that an agent with these settings left running; returns when all are gone.

    Raises:
        SollolError: PORT_TAKEN; that agent runs, and its engines are its own to end.
    """
    places = directories(environ, state=config.state_dir, log=config.log_dir, run=config.run_dir)
    with sole_owner(places.state):
        left = Directories(log=places.log, run=places.run, state=places.state)
        log.info("engines_ended", instances=await end_everything(left, grace_s=config.stop_grace_s))
