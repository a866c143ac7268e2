"""A relay between JAX's client and the coordinator in process 0.

When process 0 dies, the kernel closes its connections, and JAX's C++ client then aborts its own process within
milliseconds, with a stack trace. That cannot be configured: `jax_enable_recoverability` does not cover the coordinator,
and the callback that jaxlib accepts instead cannot be written in Python (its argument's type has no binding). So the
client connects to this relay in its own process, which keeps the connection open after the coordinator is gone and
reports the loss, so that the command can end with one line that says what happened.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

# In seconds. Process 0 may start later than the others.
CONNECT_TIMEOUT = 10.0
RETRY = 0.2

BUFFER = 1 << 16

NO_PROXY = "no_grpc_proxy"


class Relay:
  """Forwards connections from a port of this machine.

  Args:
    coordinator: HOST:PORT of process 0.
    on_loss: called from another thread when the coordinator has closed a connection that this process still uses.

  Attributes:
    address: HOST:PORT to connect to instead.
    lost: set before `on_loss` is called.
  """

  def __init__(self, coordinator: str, on_loss: Callable[[], object] = lambda: None):
    host, _, port = coordinator.rpartition(":")
    self._target = host.strip("[]"), int(port)
    self._server = socket.create_server(("127.0.0.1", 0))
    self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
    self.lost, self._on_loss = threading.Event(), on_loss
    # gRPC would otherwise use a proxy even for this connection.
    excluded = os.environ.get(NO_PROXY) or os.environ.get("no_proxy") or ""
    os.environ[NO_PROXY] = f"{excluded},127.0.0.1".lstrip(",")
    self._start(self._accept)

  def _accept(self) -> None:
    while True:
      client, _ = self._server.accept()
      self._start(self._connect, client)

  def _connect(self, client: socket.socket) -> None:
    coordinator = self._reach_coordinator()
    if coordinator is None:
      client.close()  # the client retries
      return
    for end in (client, coordinator):
      end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    closed = threading.Event()
    self._start(self._forward_answers, coordinator, client, closed)
    with client, coordinator:
      try:
        _forward(client, coordinator)
        closed.set()
      except _TargetLost:  # the client must not notice; the other thread reports it
        _wait_for_end(client)
      with contextlib.suppress(OSError):
        coordinator.shutdown(socket.SHUT_RDWR)  # wakes the other thread

  def _reach_coordinator(self) -> socket.socket | None:
    start = time.monotonic()
    while time.monotonic() - start < CONNECT_TIMEOUT:
      with contextlib.suppress(OSError):
        connection = socket.create_connection(self._target, timeout=CONNECT_TIMEOUT)
        connection.settimeout(None)
        return connection
      time.sleep(RETRY)
    return None

  def _forward_answers(self, coordinator: socket.socket, client: socket.socket, closed: threading.Event) -> None:
    try:
      answered = _forward(coordinator, client)
    except _TargetLost:
      return
    if answered and not closed.is_set():
      self.lost.set()
      self._on_loss()
    else:
      with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)

  def _start(self, function, *arguments) -> None:
    threading.Thread(target=function, args=arguments, name="relay", daemon=True).start()


class _TargetLost(Exception):
  """The target of a connection is gone, so data cannot be forwarded."""


def _forward(source: socket.socket, target: socket.socket) -> bool:
  """Copies until the source is closed; returns whether there was anything to copy.

  Raises:
    _TargetLost: the target is closed.
  """
  copied = False
  while data := _receive(source):
    copied = True
    try:
      target.sendall(data)
    except OSError as error:
      raise _TargetLost from error
  return copied


def _wait_for_end(source: socket.socket) -> None:
  while _receive(source):
    pass


def _receive(source: socket.socket) -> bytes:
  """Returns the bytes that have arrived; b"" once the source is closed."""
  try:
    return source.recv(BUFFER)
  except OSError:
    return b""
