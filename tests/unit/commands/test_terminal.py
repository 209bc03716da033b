"""A command's own lines reach its terminal; what its process and its children print goes to the log."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import os, subprocess, typer
from dflash_ray.commands.terminal import Steps, console, fail, logs_kept_apart, new_table

def main(log: str):
    with logs_kept_apart("test", log if log != "new" else None), Steps() as steps:
        steps.begin("first step")
        print("printed by python")
        os.write(2, b"printed by a library\\n")
        subprocess.run(["echo", "printed by a child"])
        console.out("an answer")
        table = new_table("name", "value")
        table.add_row("rows", "1")
        console.print(table)
        {end}

typer.run(main)
"""


def run(log: str, end: str = "") -> subprocess.CompletedProcess[str]:
    code = COMMAND.replace("{end}", end)
    return subprocess.run([sys.executable, "-c", code, "--", log], capture_output=True, text=True, timeout=60)


def test_results_go_to_stdout_steps_to_stderr_and_chatter_to_the_log(tmp_path):
    log = tmp_path / "command.log"
    done = run(str(log))
    assert done.returncode == 0
    assert done.stdout.split() == ["an", "answer", "name", "value", "rows", "1"]
    assert done.stderr == f"logs: {log}\nfirst step ...\n"
    assert set(log.read_text().splitlines()) == {f"printed by {who}" for who in ("python", "a library", "a child")}


def test_without_a_name_the_log_is_a_new_file_that_only_its_owner_reads():
    done = run("new")
    log = Path(done.stderr.splitlines()[0].removeprefix("logs: "))
    assert "printed by a child" in log.read_text() and log.stat().st_mode & 0o777 == 0o600
    log.unlink()


def test_logs_can_go_to_stderr_and_stdout_still_has_results_alone():
    done = run("-")
    assert done.stdout.splitlines()[0] == "an answer" and "printed" not in done.stdout
    assert "printed by a child" in done.stderr and "logs:" not in done.stderr


def test_a_failure_shows_the_logs_end_below_the_error(tmp_path):
    done = run(str(tmp_path / "log"), end="fail('model.path: no such folder')")
    assert done.returncode == 1
    error, where, *tail = done.stderr.splitlines()[2:]
    assert error == "error: model.path: no such folder"
    assert where == f"the end of {tmp_path / 'log'}:"
    assert "  | printed by a child" in tail


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(tmp_path):
    done = run(str(tmp_path / "log"), end="{}['missing']")
    assert done.returncode == 1
    assert "error: KeyError: 'missing'" in done.stderr.splitlines()
    assert not any(line.startswith("Traceback") for line in done.stderr.splitlines())
    assert "Traceback" in (tmp_path / "log").read_text()


def test_an_interrupted_command_says_so_and_ends_as_shells_expect(tmp_path):
    done = run(str(tmp_path / "log"), end="raise KeyboardInterrupt")
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "stopped"


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_log_that_cannot_be_written_is_named(command, tmp_path):
    arguments = [sys.executable, "-m", "dflash_ray.cli", command, "--log", str(tmp_path / "none" / "log")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --log {tmp_path / 'none' / 'log'}: No such file") and done.stdout == ""
