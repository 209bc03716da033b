"""What a command shows: results on stdout, steps and errors on stderr, and the logs of what it starts in a file.

On a terminal a running step has a spinner and its time; elsewhere every step is a plain line.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# soft_wrap: lines are as long as they are, so that they can be copied and searched for.
console = Console(highlight=False, soft_wrap=True)
notes = Console(highlight=False, soft_wrap=True, stderr=True)

LOG_TO_STDERR = "-"
_TAIL_LINES = 20
_log: Path | None = None  # of the command that runs, while its output goes there


def fail(message: str) -> NoReturn:
    """Ends the command with one line, and below it the end of the log where one is kept."""
    notes.out(f"error: {message}")
    if _log is not None:
        sys.stderr.flush()
        lines = _log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        notes.out(f"the end of {_log}:" if lines else f"{_log} is empty")
        for line in lines:
            notes.out(f"  | {line}")
    raise typer.Exit(1)


def new_table(*columns: str, title: str | None = None, has_header: bool = True) -> Table:
    """A table with a frame on a terminal, and in plain columns elsewhere."""
    on_terminal = console.is_terminal
    table = Table(*columns, title=title, title_justify="left", show_header=has_header, pad_edge=on_terminal)
    table.box = box.ROUNDED if on_terminal else None
    return table


@contextmanager
def logs_kept_apart(command: str, log: str | None) -> Iterator[None]:
    """Keeps the terminal for `console` and `notes`: what this process and its children print goes to the log.

    Ends the command on Ctrl-C, and turns an error that nobody expected into one line; its traceback is in the log.

    Args:
        log: file that is appended to, LOG_TO_STDERR, or None for a new file in the temporary folder.
    """
    global _log
    with ExitStack() as restore:
        if log == LOG_TO_STDERR:
            chatter = os.dup(2)
        else:
            try:
                chatter, path = _open_log(command, log)
            except OSError as error:
                named = "no temporary file for the logs" if log is None else f"--log {log}"
                fail(f"{named}: {error.strerror}; name a file that can be written, or {LOG_TO_STDERR} for stderr")
            notes.out(f"logs: {path}")
            _log = path
        restore.callback(_forget_log)
        for stream, shown in ((sys.stdout, console), (sys.stderr, notes)):
            _divert(stream, shown, chatter, restore)
        os.close(chatter)
        try:
            yield
        except KeyboardInterrupt:
            notes.out("stopped")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as error:
            traceback.print_exc()
            fail(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}")


def _open_log(command: str, log: str | None) -> tuple[int, Path]:
    if log is None:
        number, name = tempfile.mkstemp(prefix=f"dflash-ray-{command}-", suffix=".log")
        return number, Path(name)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), Path(log)


def _forget_log() -> None:
    global _log
    _log = None


def _divert(stream: TextIO, shown: Console, chatter: int, restore: ExitStack) -> None:
    """Sends the stream's descriptor, and with it those of children, to `chatter`, and `shown` to where it went."""
    number = 1 if stream is sys.stdout else 2
    stream.flush()
    kept = restore.enter_context(os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors="replace"))
    os.dup2(chatter, number)

    def give_back() -> None:
        stream.flush()
        kept.flush()
        os.dup2(kept.fileno(), number)
        shown.file = stream

    restore.callback(give_back)
    shown.file = kept


class Steps:
    """The steps of a command, one after another; a context manager that ends the last one."""

    def __init__(self) -> None:
        self._text = ""
        self._began = 0.0
        self._live: Progress | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, text: str) -> None:
        """Ends the step before and names the next."""
        self.end()
        self._text, self._began = text, time.monotonic()
        if not notes.is_terminal:
            notes.out(f"{text} ...")
            return
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        # What is diverted stays diverted: Progress would show it above its line.
        self._live = Progress(
            *columns,
            console=notes,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.add_task(text, total=None)
        self._live.start()

    def say(self, detail: str) -> None:
        """Says on a terminal how far the step is."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=f"{self._text}: {detail}")

    def end(self) -> None:
        """Ends the step, so that results can be shown."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            mark = "[green]✓[/green]" if sys.exc_info()[0] is None else "[red]✗[/red]"
            notes.print(f"{mark} {self._text} [dim]{time.monotonic() - self._began:.0f} s[/dim]")
