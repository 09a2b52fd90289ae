"""A port of this machine on which nobody listens."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns the number of a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
