"""`make setup` says what it does, and why it failed."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_setup_that_fails_names_the_step_and_its_log_and_shows_the_logs_end(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'Python 3.11 or newer is needed' >&2\nexit 1\n")
    python.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", "demo", f"VENV={venv}", f"PYTHON={python}"]
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # of `make test`
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stdout == ""
    announced, step, tail, named, _ = done.stderr.splitlines()
    assert announced.endswith(f"{venv}/setup.log") and named.endswith(f"{venv}/setup.log")
    assert step == "setup: Python" and tail == "  | Python 3.11 or newer is needed"
    assert not (venv / ".installed").exists()
