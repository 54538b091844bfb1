"""The operator CLI, `sollol`: a user of the head like any other, through `sollol.client`.

argparse, because importing Typer alone takes twice the time that `sollol --help` may take. Each command's module is
imported when the command runs.
"""

import gc
import sys


def main() -> None:
    from sollold.cli.arguments import run

    status = run(sys.argv[1:])
    gc.freeze()  # the process is over: no collection need look at what was imported
    sys.exit(status)
