"""Runs the CLI as its users do."""

import asyncio
import sys


async def sollol(*words, stdin=b"", env=None):
    """Exit status, standard output and standard error of one command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sollold.cli", *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 20)
    return process.returncode, out.decode(), err.decode()
