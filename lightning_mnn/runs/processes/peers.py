"""Connections between the processes of a run: each learns at once of a signal to another, or of another's death.

Collectives cannot provide this: a process that waits in one runs no signal handler, and if another has died it may wait
for minutes or forever. So all processes connect to the first one: when a process dies, its connection closes.
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

_MESSAGE = struct.Struct("!BI")  # kind of message, and a number
_HANDSHAKE = struct.Struct("!16sII")  # the run's secret, rank, process id
_SECONDS = 30.0  # time limit for all to connect


class News(IntEnum):
    """A message from one process to another, with a number."""

    STOP = 1  # the sender got the signal with this number
    STOP_NOW = 2  # the sender got a second signal
    LOST = 3  # the process of this rank is gone
    FAREWELL = 4  # the sender has ended training without an error


@dataclass(eq=False)
class Peer:
    """Another process of the run, and the connection to it."""

    rank: int
    pid: int
    connection: socket.socket

    def send(self, news: News, number: int = 0) -> None:
        """Send a message; do nothing if the process is gone."""
        with suppress(OSError):
            self.connection.sendall(_MESSAGE.pack(news, number))

    def receive(self) -> tuple[News, int] | None:
        """The next message; None: the process is gone."""
        content = _received(self.connection, _MESSAGE.size)
        if content is None:
            return None
        news, number = _MESSAGE.unpack(content)
        return News(news), number


def connect(trainer: pl.Trainer) -> list[Peer]:
    """Connect all processes of a run to the first one; every process calls this.

    Returns:
        For the first process all others, for another process the first one. If connections cannot be made, a warning
        says so, and the list lacks them.
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
                return _accept(server, secret, trainer.world_size - 1)
            connection = socket.create_connection((host, port), timeout=_SECONDS)
        except OSError as error:
            rank_zero_warn(
                f"The processes of this run cannot connect to one another at {host}:{port} ({error}): a signal to one "
                "reaches the others only at a step, and if one dies, the others end when their collectives fail"
            )
            return []
        connection.settimeout(None)
        connection.sendall(_HANDSHAKE.pack(secret, trainer.global_rank, os.getpid()))
        return [Peer(0, pid, connection)]


def _accept(server: socket.socket, secret: bytes, count: int) -> list[Peer]:
    """The processes that connect and send the secret."""
    peers: list[Peer] = []
    deadline = time.monotonic() + _SECONDS
    while len(peers) < count:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        connection, _ = server.accept()
        connection.settimeout(_SECONDS)
        content = _received(connection, _HANDSHAKE.size)
        if content is None or not secrets.compare_digest(content[:16], secret):
            connection.close()
            continue
        connection.settimeout(None)
        _, rank, pid = _HANDSHAKE.unpack(content)
        peers.append(Peer(rank, pid, connection))
    return peers


def _received(connection: socket.socket, size: int) -> bytes | None:
    """The next bytes; None: the other process is gone."""
    try:
        content = connection.recv(size, socket.MSG_WAITALL)
    except OSError:
        return None
    return content if len(content) == size else None
