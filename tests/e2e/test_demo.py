import subprocess
import sys
from pathlib import Path


def test_the_demo_places_streams_measures_and_leaves_nothing_running(engine_binary):
    """It runs as `make demo` runs it; `no_process_left` looks after it a second time."""
    assert engine_binary  # it takes whichever engine it finds, so there must be one
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selected node-" in done.stdout
    assert "good luck with your cluster!" in done.stdout
    assert "tokens/s" in done.stdout
    assert "Nothing is left running." in done.stdout
