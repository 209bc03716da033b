"""Ports for servers that a benchmark starts."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One outside what the system hands to others meanwhile (32768 and above) and what Ray gives its workers."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
