"""What the processes of a run tell each other: that they are alive, and what ends the run.

Every process has a thread that exchanges messages through JAX's coordination service, which process 0 hosts. Process 0
notices when another is silent; the others notice when process 0 is. Silence counts only while this process itself runs,
so that one that was suspended does not blame the others.
"""

import collections
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from univid_jax.core.process_identity import ProcessIdentity

log = logging.getLogger(__name__)

# Seconds between messages, between messages while the run ends, and of silence that count as death once a collective
# has failed, which is a sign that a process has died.
INTERVAL = 1.0
QUICK_INTERVAL = 0.1
SUSPICIOUS_SILENCE = 5.0
# Seconds that the others may take to introduce themselves, once all are connected.
INTRODUCTION = 10.0

ADVICE = "rerun the same command to resume"


@runtime_checkable
class Store(Protocol):
  """Text by key that all processes share; every operation may raise or block when process 0 is gone."""

  def create(self, key: str, value: str) -> None:
    """Sets a value, unless the key has one."""
    ...

  def replace(self, key: str, value: str) -> None: ...

  def read(self, folder: str) -> Mapping[str, str]:
    """Returns all values under `folder/`, by the rest of their keys."""
    ...


class Peers:
  """The other processes of a run.

  Args:
    store: shared by all of them.
    index, count: index of this process, number of all.
    heartbeat_seconds: silence after which a process is dead.
    is_cut_off: whether the connection to process 0 is lost.

  Attributes:
    events: events posted by any process, by name, as of the last exchange.
    dead: processes that `find_dead` has found.
  """

  def __init__(
    self,
    store: Store,
    *,
    index: int,
    count: int,
    heartbeat_seconds: float,
    is_cut_off: Callable[[], bool] = lambda: False,
  ):
    self.index, self.count = index, count
    self.events: Mapping[str, Any] = {}
    self.dead: set[int] = set()
    self._store, self._timeout, self._is_cut_off = store, heartbeat_seconds, is_cut_off
    self._interval = min(INTERVAL, heartbeat_seconds / 5)
    self._identities: dict[int, ProcessIdentity] = {index: ProcessIdentity.current()}
    self._knows_identities = threading.Event()
    self._beats: Mapping[str, str] = {}
    self._ended: dict[int, int] = {}  # the exchange before which the end was seen
    self._watched: dict[int, _Watched] = {}
    self._outbox: collections.deque[tuple[str, str]] = collections.deque()
    self._exchanges = 0
    self._wake, self._stopped = threading.Event(), threading.Event()
    self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

  def start(self) -> None:
    """Starts the exchange; returns once the processes can be named."""
    identity = json.dumps(dataclasses.asdict(self._identities[self.index]))
    # Process 0 watches all others, and they watch it.
    self._store.replace(f"identity/{self.index}" if self.index else "host/0", identity)
    self._thread.start()
    self._knows_identities.wait(timeout=INTRODUCTION)

  def stop(self) -> None:
    """Ends the exchange; the store may be closed afterwards."""
    self._stopped.set()
    self._wake.set()
    self._thread.join(timeout=SUSPICIOUS_SILENCE)

  def post(self, name: str, **values: Any) -> None:
    """Posts an event to all processes; of several with one name, the first counts."""
    self._outbox.append((f"event/{name}", json.dumps(values)))
    self._wake.set()

  def collect(self, kind: str) -> dict[int, Any]:
    """Returns the events KIND/PROCESS by process."""
    prefix = f"{kind}/"
    return {int(name.removeprefix(prefix)): value for name, value in self.events.items() if name.startswith(prefix)}

  def describe(self, index: int) -> str:
    """Returns "process INDEX", with its pid and host if they are known."""
    identity = self._identities.get(index)
    return f"process {index} ({identity.host}, pid {identity.pid})" if identity else f"process {index}"

  def find_dead(self, elapsed: float) -> str | None:
    """Returns a message about a process that has died, if there is one.

    Args:
      elapsed: seconds since the last call during which this process was running.
    """
    limit = min(SUSPICIOUS_SILENCE, self._timeout) if "suspicion" in self.events else self._timeout
    for index in {0} if self.index else set(range(1, self.count)) - self.gone:
      sign = self._beats.get(str(index)) if self.index == 0 else str(self._exchanges)
      silence = self._watched.setdefault(index, _Watched()).note(sign, elapsed)
      if self._has_died(index):
        reason = "has died"
      elif index == 0 and self._is_cut_off():
        reason = "has ended or cannot be reached"
      elif silence >= limit:
        reason = f"has not responded for {limit:.0f} s"
      else:
        continue
      self.dead.add(index)
      return f"{self.describe(index)} {reason}; {ADVICE}"
    return None

  def _has_died(self, index: int) -> bool:
    """Returns whether a process on this machine has ended without a farewell."""
    identity = self._identities.get(index)
    if not (identity and identity.has_ended):
      return False
    seen = self._ended.setdefault(index, self._exchanges)
    # Its farewell may be on its way, except from process 0, which delivers it.
    return index == 0 or self._exchanges > seen + 1

  @property
  def gone(self) -> set[int]:
    """The processes that have left or died."""
    return {*self.collect("left"), *self.collect("done"), *self.dead}

  def _run(self) -> None:
    while not self._stopped.is_set():
      try:
        self._exchange()
      except Exception as error:  # of various types; if they persist, they count as silence
        log.debug("no exchange with process 0: %s", error)
      is_quick = self.events or not self._knows_identities.is_set()
      self._wake.wait(QUICK_INTERVAL if is_quick else self._interval)
      self._wake.clear()

  def _exchange(self) -> None:
    while self._outbox:
      self._store.create(*self._outbox[0])
      self._outbox.popleft()
    self._store.replace(f"beat/{self.index}", str(self._exchanges))
    if not self._knows_identities.is_set():
      for index, text in self._store.read("host" if self.index else "identity").items():
        self._identities[int(index)] = ProcessIdentity(**json.loads(text))
      if len(self._identities) == (2 if self.index else self.count):
        self._knows_identities.set()
    if self.index == 0:
      self._beats = self._store.read("beat")
    self.events = {name: json.loads(text) for name, text in self._store.read("event").items()}
    self._exchanges += 1

  @property
  def has_posted(self) -> bool:
    """Whether everything that was posted has reached the store."""
    return not self._outbox


@dataclasses.dataclass
class _Watched:
  """How long a process has been silent."""

  sign: str | None = None
  silence: float = 0.0

  def note(self, sign: str | None, elapsed: float) -> float:
    self.silence = 0.0 if sign != self.sign else self.silence + elapsed
    self.sign = sign
    return self.silence
