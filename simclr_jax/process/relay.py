"""A relay to process 0, so that a broken connection ends a process in one line, without a stack trace.

JAX's distributed client aborts its process the moment that its connection to process 0 breaks. Therefore
each process connects to a port of its own machine, where this relay listens: that connection never breaks.
The relay forwards every byte to process 0 and back, and reports when process 0 has gone.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress


def start(address: str, on_loss: Callable[[OSError | None], None]) -> str:
    """Waits for process 0, and forwards bytes between it and a local port, in threads that end with this one.

    Args:
      address: HOST:PORT of process 0.
      on_loss: called with the error, if there was one, when the connection to process 0 breaks.

    Returns:
      HOST:PORT of the local port.
    """
    host, _, port = address.rpartition(":")
    target = host.strip("[]"), int(port)
    while True:  # until process 0 accepts connections
        with suppress(OSError):
            socket.create_connection(target, timeout=5).close()
            break
        time.sleep(0.3)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            client, _ = listener.accept()
            try:
                coordinator = socket.create_connection(target, timeout=30)
                coordinator.settimeout(None)
            except OSError as error:
                on_loss(error)
                continue
            threading.Thread(target=upload, args=(client, coordinator), daemon=True).start()
            threading.Thread(target=download, args=(coordinator, client), daemon=True).start()

    def upload(client, coordinator):
        _copy(client, coordinator)
        coordinator.close()

    def download(coordinator, client):
        on_loss(_copy(coordinator, client))

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _copy(source, target) -> OSError | None:
    """Copies bytes until `source` is closed; returns the error where the connection broke."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError as error:
        return error
    return None
