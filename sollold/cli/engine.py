"""`sollol engine build|show`: engines are the agent's business, so its own program does it, as a child."""

import argparse
import subprocess
import sys


def engine(options: argparse.Namespace) -> int:
    """Exit status: the child's own; 130 after Ctrl-C, which the child gets too."""
    with subprocess.Popen([sys.executable, "-P", "-m", "agent.engine", options.action, *options.rest]) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()
            return 130
    return 128 - status if status < 0 else status
