"""Ends a command in order: on a signal, or when another process of its run fails or dies.

SIGTERM may come at any time, to one process or to all of them at different times. A loop whose work would be lost
passes safe points and asks at each whether to stop (`Supervisor.stepping`). All processes of a run pass the same safe
points, so they agree on one that none of them has passed yet, save there and exit together. Everywhere else no work is
lost, and the main thread is interrupted as by Ctrl-C. JAX's preemption service, behind
`multihost_utils.reached_preemption_sync_point`, agrees on a step in the same way, but only on SIGTERM and only inside a
loop, and it does not cover failures.

At exit JAX waits for the other processes, and aborts if they are gone. So unless all of them leave together, a process
ends without that exit.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator

from univid_jax.core.errors import Interrupted
from univid_jax.runtime.main_thread import CLEAN_UP, TICK, MainThread, exit_at_once
from univid_jax.runtime.peers import SUSPICIOUS_SILENCE, Peers
from univid_jax.runtime.safe_points import SafePoints

# Seconds that process 0 gives the others to leave before it closes the service through which they learn why.
FAREWELL = 5.0

EXIT_CODES = {"SIGTERM": 75, "SIGINT": 130}


@dataclasses.dataclass(frozen=True)
class StopSignal:
  """A signal that asked the run to stop.

  Attributes:
    name: SIGTERM or SIGINT.
    origin: index of the process that received it, if not this one.
  """

  name: str
  origin: int | None = None

  def interrupt(self, result: str) -> Interrupted:
    """Returns the exception that ends the command; `result` completes its message: where it stopped, and what to do."""
    origin = "" if self.origin is None else f" to process {self.origin}"
    return Interrupted(f"stopped by {self.name}{origin}{result}", EXIT_CODES[self.name])


class Supervisor:
  """Watches over the command that runs in the main thread, and over the other processes of its run.

  Args:
    has_watch: whether signals are noticed even while the main thread runs no Python.

  Attributes:
    stop_signal: why to stop, once `should_stop` has returned True.
    can_continue: whether rerunning the command continues its work; the message says so when a signal ends it.
    resources: resources to release when the command ends.
  """

  def __init__(self, *, has_watch: bool = True):
    self.stop_signal: StopSignal | None = None
    self.can_continue = True
    self.resources = contextlib.ExitStack()
    self._main = MainThread(
      self._receive, on_tick=self._follow_peers, before_exit=self._say_goodbye, has_watch=has_watch
    )
    self._points = SafePoints()
    self._has_signal = False
    self._peers: Peers | None = None
    self._disconnect: Callable[[], None] = lambda: None

  @contextlib.contextmanager
  def listen(self) -> Iterator["Supervisor"]:
    """Turns signals into `Interrupted` in the block; afterwards they are ignored until `close`."""
    global _current
    outer, _current = _current, self
    try:
      with self._main.listen():
        yield self
    finally:
      _current = outer

  def close(self, *, ignore_signals: bool = False) -> None:
    """Releases the resources and restores the signal handlers, or ignores signals from now on."""
    self.resources.close()
    self._main.close(ignore_signals=ignore_signals)

  def join(self, peers: Peers, disconnect: Callable[[], None]) -> None:
    """Watches over the other processes, too.

    Args:
      peers: the processes.
      disconnect: disconnects this process from them; returns when all have called it.
    """
    self._main.install()  # JAX has installed its own SIGTERM handler, for its preemption service
    self._disconnect = disconnect
    peers.start()
    self._peers = peers

  @contextlib.contextmanager
  def stepping(self) -> Iterator["Supervisor"]:
    """Defers signals to the next safe point within the block."""
    self._points.enter()
    try:
      yield self
    except BaseException:
      self._points.abandon()
      raise
    self._points.leave()
    if self.stop_signal:
      raise self._interrupt_idle(self.stop_signal)

  def should_stop(self) -> bool:
    """Passes a safe point; returns whether to save and stop. All processes must call it at the same points."""
    self._main.raise_interrupt()
    return self._points.reach()

  def end(self, message: str) -> None:
    """Ends the command with an error, from any thread."""
    self._post_end(message)
    self._main.interrupt(_failure(message))

  def _receive(self, name: str) -> None:
    """Handles a signal that this process received."""
    is_repeated, self._has_signal = self._has_signal, True
    if is_repeated:
      if name == "SIGINT":
        self._main.interrupt(Interrupted("interrupted", EXIT_CODES[name]))
    elif self._peers is not None:
      self._peers.post("stop", signal=name, process=self._peers.index)
    else:
      self.stop_signal = StopSignal(name)
      self._decide([self._points.freeze()])

  def _decide(self, progress: Collection[int]) -> None:
    """Decides where to stop, given how many safe points each process has passed."""
    if self._points.decide(progress) and self.stop_signal:
      self._main.interrupt(self._interrupt_idle(self.stop_signal))

  def _interrupt_idle(self, stop_signal: StopSignal) -> Interrupted:
    return stop_signal.interrupt("; rerun the same command to continue" if self.can_continue else "")

  def _follow_peers(self, elapsed: float) -> None:
    """Stops when the other processes do, and checks that they are alive."""
    if self._peers is None:
      return
    peers = self._peers
    if cause := self._find_end(peers, elapsed):
      self._main.interrupt(cause)
    elif "stop" in peers.events and not self._points.is_decided:
      if self.stop_signal is None:
        name, origin = peers.events["stop"]["signal"], peers.events["stop"]["process"]
        self.stop_signal = StopSignal(name, None if origin == peers.index else origin)
        peers.post(f"at/{peers.index}", progress=self._points.freeze())
      progress = peers.collect("at")
      if len(progress) == peers.count:
        self._decide([each["progress"] for each in progress.values()])

  def _find_end(self, peers: Peers, elapsed: float) -> Interrupted | None:
    """Returns the exception for a run that another process has ended; None if it goes on."""
    if "end" in peers.events:
      return _failure(peers.events["end"]["line"])
    if message := peers.find_dead(elapsed):
      peers.post("end", line=message)
      return _failure(message)
    return None

  def find_cause(self, error: BaseException, *, is_suspicious: bool) -> BaseException:
    """Returns why the command ends: its own error or another process's; waits while that is unclear.

    Args:
      error: the error of this process.
      is_suspicious: whether the error looks like a consequence of another process's end.
    """
    if isinstance(error, Interrupted):
      return error
    cause, waited = self._main.interrupt_error, 0.0
    if self._peers is not None and is_suspicious:
      self._peers.post("suspicion")
      while cause is None and waited < 2 * SUSPICIOUS_SILENCE:
        time.sleep(TICK)
        waited += TICK
        cause = self._find_end(self._peers, TICK)
    return cause or error

  def claim_report(self) -> bool:
    """Returns whether the caller is the first to report why the command ends."""
    return self._main.claim_report()

  def finish(self) -> None:
    """Waits until all processes have called it, and disconnects from them."""
    if self._peers is not None:
      self._peers.post(f"done/{self._peers.index}")
      while len(self._peers.collect("done")) < self._peers.count:
        time.sleep(TICK / 2)
      self._part(self._peers)

  def leave(self, code: int, line: str) -> None:
    """Disconnects from the other processes after an error or an interruption; may end this process at once.

    Args:
      code: exit code.
      line: the message that the others report.
    """
    if self._peers is not None:
      has_stopped = self._points.is_decided and code in EXIT_CODES.values()
      if not has_stopped:
        self._post_end(line)
      if self._say_goodbye() and has_stopped and self._points.has_stopped:
        self._part(self._peers)
      else:
        exit_at_once(code)
    elif self._main.was_interrupted:
      exit_at_once(code)

  def _post_end(self, message: str) -> None:
    if self._peers is not None:
      self._peers.post("end", line=f"{self._peers.describe(self._peers.index)} failed: {message}")

  def _say_goodbye(self) -> bool:
    """Leaves the run; returns whether all processes do. Process 0 waits for them, because it hosts their messages."""
    peers, together = self._peers, self._points.has_stopped
    if peers is None:
      return True
    peers.post(f"left/{peers.index}")
    start = time.monotonic()
    while time.monotonic() - start < (CLEAN_UP if together else FAREWELL):
      if len(peers.gone) == peers.count:
        return not peers.dead
      if peers.index and (0 in peers.dead or (peers.has_posted and not together)):
        return False
      time.sleep(TICK / 2)
    return False

  def _part(self, peers: Peers) -> None:
    self._peers = None
    peers.stop()
    self._disconnect()


def _failure(line: str) -> Interrupted:
  return Interrupted(f"error: {line}", 1)


_current: Supervisor | None = None


def current() -> Supervisor:
  """Returns the supervisor of the running command."""
  assert _current, "only commands have one"
  return _current


@contextlib.contextmanager
def supervise() -> Iterator[Supervisor]:
  """Yields the supervisor of the running command; outside of commands one that lets the loop react to signals."""
  if _current is not None:
    yield _current
    return
  supervisor = Supervisor(has_watch=False)
  try:
    with supervisor.listen():
      yield supervisor
  finally:
    supervisor.close()
