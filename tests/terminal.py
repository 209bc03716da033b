"""`dflash-ray` as a user runs it: a process of its own, without a terminal or on one."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence

# Nothing listens on port 9: what goes through this proxy fails.
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy", "all_proxy"), "http://127.0.0.1:9")
COMMAND = (sys.executable, "-m", "dflash_ray.cli")


def behind_a_proxy() -> dict[str, str]:
    """An environment in which only a client that ignores it reaches 127.0.0.1."""
    return {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | PROXIES


def run(*arguments: str, env: dict[str, str] | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """A command with pipes for its streams."""
    return subprocess.run([*COMMAND, *arguments], env=env, capture_output=True, text=True, timeout=timeout_s)


class OnTerminal:
    """A command on a pseudo-terminal that it controls, so that a key pressed there reaches it and its children."""

    def __init__(self, command: Sequence[str], **env: str) -> None:
        """Starts it with `env` over this process's own environment."""
        self.screen = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), {**os.environ, "TERM": "xterm", "COLUMNS": "200", **env})

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The pattern's match on the screen; TimeoutError shows what is there instead."""
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.screen)) is None:
            if time.monotonic() > deadline or not self._read(deadline):
                raise TimeoutError(f"no {pattern!r} on the screen:\n{self.screen}")
        return found

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def exit_status(self, timeout_s: float) -> int:
        """Reads until the command ends."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running:\n{self.screen}")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, deadline: float) -> bool:
        """Whether the command can still write; Linux reports the end of a terminal as an error."""
        if not select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return True
        try:
            data = os.read(self._terminal, 65536)
        except OSError:
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)
