"""Connections between the processes of one run: each hears at once of a signal to another, and of another's death.

Collectives cannot tell: a process that waits in one runs no signal handler, and where another has died it may wait for
minutes or for ever. So all processes connect to the first one, whose end of a connection closes with the process.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_warn

if TYPE_CHECKING:
    import pytorch_lightning as pl

_MESSAGE = struct.Struct("!BI")  # what, and a number
_GREETING = struct.Struct("!16sII")  # the run's secret, the rank, the process id
_SECONDS = 30.0  # for all to connect


class News(IntEnum):
    """What a process tells another, with a number."""

    STOP = 1  # it got a signal of this number
    STOP_NOW = 2  # it got one for the second time
    LOST = 3  # the process of this rank is gone
    FAREWELL = 4  # it has left training in good order


@dataclass(eq=False)
class Peer:
    """Another process of the run, and the connection to it."""

    rank: int
    pid: int
    connection: socket.socket

    def tell(self, news: News, number: int = 0) -> None:
        """Send a message, or nothing to a process that is gone."""
        with suppress(OSError):
            self.connection.sendall(_MESSAGE.pack(news, number))

    def hear(self) -> tuple[News, int] | None:
        """The next message; None: the process is gone."""
        content = _received(self.connection, _MESSAGE.size)
        if content is None:
            return None
        news, number = _MESSAGE.unpack(content)
        return News(news), number


def connect(trainer: pl.Trainer) -> list[Peer]:
    """Connect all processes of a run to the first one; each calls this.

    Returns:
        For the first process all others, for another the first one. Where connections cannot be made, a warning says
        so, and the list lacks them.
    """
    if trainer.world_size == 1:
        return []
    nodes = trainer.num_nodes
    with socket.create_server(("127.0.0.1" if nodes == 1 else "", 0), backlog=trainer.world_size) as server:
        host = "127.0.0.1" if nodes == 1 else os.environ.get("MASTER_ADDR", socket.gethostname())
        place = (host, server.getsockname()[1], secrets.token_bytes(16), os.getpid())
        host, port, secret, pid = trainer.strategy.broadcast(place)
        try:
            if trainer.is_global_zero:
                return _welcome(server, secret, trainer.world_size - 1)
            connection = socket.create_connection((host, port), timeout=_SECONDS)
        except OSError as error:
            rank_zero_warn(
                f"The processes of this run cannot connect to one another at {host}:{port} ({error}): a signal to one "
                "reaches the others at a step only, and where one dies, the others end when their collectives fail"
            )
            return []
        connection.settimeout(None)
        connection.sendall(_GREETING.pack(secret, trainer.global_rank, os.getpid()))
        return [Peer(0, pid, connection)]


def _welcome(server: socket.socket, secret: bytes, count: int) -> list[Peer]:
    """The processes that connect and know the secret."""
    peers: list[Peer] = []
    deadline = time.monotonic() + _SECONDS
    while len(peers) < count:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        connection, _ = server.accept()
        connection.settimeout(_SECONDS)
        content = _received(connection, _GREETING.size)
        if content is None or not secrets.compare_digest(content[:16], secret):
            connection.close()
            continue
        connection.settimeout(None)
        _, rank, pid = _GREETING.unpack(content)
        peers.append(Peer(rank, pid, connection))
    return peers


def _received(connection: socket.socket, size: int) -> bytes | None:
    content = b""
    while len(content) < size:
        try:
            part = connection.recv(size - len(content))
        except OSError:
            return None
        if not part:
            return None
        content += part
    return content
