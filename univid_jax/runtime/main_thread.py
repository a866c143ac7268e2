"""Interrupts the main thread on signals, and ends the process if that is not possible.

A signal is noticed at once, even while the main thread waits for a device or a compiler: Python's handlers run only
when the main thread runs Python, but Python also writes the signal's number to a socket that another thread reads.

A process ends through `os._exit` if the main thread cannot be interrupted, and also after it was: an exception raised
within JAX may leave it in a state that crashes when the interpreter is torn down. Processes of a run also end this way
instead of waiting for those that are gone (`runtime.supervisor`), as do the loader's processes when their parent ends
(`data.rows.grain_adapter`).
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from univid_jax.core import lock
from univid_jax.core.errors import Interrupted

# Seconds between ticks of the watch, for the main thread to notice an interrupt, and for it to clean up.
TICK = 0.2
NOTICE = 5.0
CLEAN_UP = 20.0


class MainThread:
  """The main thread while a command or a loop runs in it.

  Args:
    on_signal: called with the name of a signal, from any thread.
    on_tick: called by the watch with the seconds since the last call, at most two ticks.
    before_exit: called before the process ends without the main thread.
    has_watch: whether a thread watches for signals; without one, they are handled when the main thread runs Python.

  Attributes:
    interrupt_error: the exception to raise in it, if any.
    was_interrupted: whether it was raised.
  """

  def __init__(
    self,
    on_signal: Callable[[str], None],
    *,
    on_tick: Callable[[float], None] = lambda elapsed: None,
    before_exit: Callable[[], object] = lambda: None,
    has_watch: bool = True,
  ):
    self.interrupt_error: Interrupted | None = None
    self.was_interrupted = False
    self._on_signal, self._on_tick, self._before_exit, self._has_watch = on_signal, on_tick, before_exit, has_watch
    self._handlers: dict[signal.Signals, Any] = {}
    self._is_listening = False
    self._is_closed = threading.Event()
    self._lock = threading.RLock()  # reentrant, because signal handlers run in the main thread
    self._may_report = threading.Lock()
    self._deadline = math.inf

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Handles signals, and raises interrupts in the block; afterwards signals are ignored until `close`."""
    self._is_listening = True
    if threading.current_thread() is threading.main_thread():
      self.install()
      if self._has_watch:
        self._start_watch()
    try:
      yield
    finally:
      with self._lock:
        self._is_listening = False

  def install(self) -> None:
    """Installs the signal handlers; again if a library has replaced them."""
    if threading.current_thread() is threading.main_thread():
      previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
      self._handlers = self._handlers or previous

  def _start_watch(self) -> None:
    self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
    self._receiver, self._sender = socket.socketpair()
    self._sender.setblocking(False)
    self._previous_sender = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
    self._watch_thread = threading.Thread(target=self._watch, name="watch", daemon=True)
    self._watch_thread.start()

  def close(self, *, ignore_signals: bool = False) -> None:
    """Restores the previous signal handlers, or ignores signals from now on."""
    self._is_closed.set()
    for number, handler in self._handlers.items():
      signal.signal(number, signal.SIG_IGN if ignore_signals else handler)
    if self._handlers and self._has_watch:
      if sys.unraisablehook == self._raise_again:  # else a library has replaced it
        sys.unraisablehook = self._previous_hook
      signal.set_wakeup_fd(self._previous_sender)
      self._sender.close()  # wakes the watch
      self._watch_thread.join()
      self._receiver.close()

  def interrupt(self, error: Interrupted) -> None:
    """Raises an exception in the main thread, from any thread; only the first call has an effect."""
    with self._lock:
      if self.interrupt_error is None:
        self.interrupt_error = error
        self._deadline = time.monotonic() + NOTICE
        self._prod()

  def raise_interrupt(self) -> None:
    """Raises the exception now if there is one; for the main thread without a watch."""
    if self.interrupt_error and not self.was_interrupted:
      self.was_interrupted = True
      self._deadline = time.monotonic() + CLEAN_UP
      raise self.interrupt_error

  def _prod(self) -> None:
    """Makes the main thread call `_handle`; a signal also interrupts system calls."""
    with self._lock:
      if self._has_watch and self._handlers and self._is_listening and not self.was_interrupted:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if not self._is_listening:
      return
    if not self._has_watch:
      self._on_signal(signal.Signals(number).name)
    self.raise_interrupt()

  def _raise_again(self, ignored: Any) -> None:
    """Has an interrupt raised again that came in a destructor or callback, where Python ignores exceptions."""
    if isinstance(ignored.exc_value, Interrupted):
      self.was_interrupted = False
    else:
      self._previous_hook(ignored)

  def _watch(self) -> None:
    last = time.monotonic()
    while not self._is_closed.is_set():
      numbers = self._receiver.recv(64) if select.select([self._receiver], [], [], TICK)[0] else b""
      now = time.monotonic()
      if self._is_listening:
        for number in numbers:
          if number in map(int, self._handlers) and not self.interrupt_error:
            self._on_signal(signal.Signals(number).name)
        self._on_tick(min(now - last, 2 * TICK))
      last = now
      if self.interrupt_error:
        self._prod()
        if now > self._deadline and self.claim_report():
          os.write(2, f"\n{self.interrupt_error}\n".encode())
          self._before_exit()
          exit_at_once(self.interrupt_error.exit_code)

  def claim_report(self) -> bool:
    """Returns whether the caller is the first to report why the command ends."""
    return self._may_report.acquire(blocking=False)


def exit_at_once(code: int) -> NoReturn:
  """Ends the process without the exit handlers of Python and libraries."""
  lock.release_all()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)
