"""Which process this is, and whether another one has ended."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import socket
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")


@dataclasses.dataclass(frozen=True)
class ProcessIdentity:
  """A process, identified among those of all machines.

  Attributes:
    host: name of the machine.
    pid: its number on that machine.
    space: the namespace of the number: two containers may share the name of a machine but not its processes.
    start: when it began, in the kernel's ticks, since numbers are reused; "" where /proc does not exist.
  """

  host: str
  pid: int
  space: str
  start: str

  @classmethod
  def current(cls) -> "ProcessIdentity":
    return cls(socket.gethostname(), os.getpid(), _space(), _start(os.getpid()))

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}"

  @property
  def machine(self) -> str:
    """Eight hexadecimal digits for `host` and `space`: equal for processes whose numbers can be compared."""
    return hashlib.sha256(f"{self.host} {self.space}".encode()).hexdigest()[:8]

  @property
  def is_local(self) -> bool:
    """Whether its number identifies the same process here."""
    return (self.host, self.space) == (socket.gethostname(), _space())

  @property
  def has_ended(self) -> bool:
    """Whether it is known to have ended; False for a process of another machine."""
    if not self.is_local:
      return False
    try:
      os.kill(self.pid, 0)
    except (ProcessLookupError, OverflowError):
      return True
    except OSError:  # another user's process, which /proc may hide
      start = _start(self.pid)
      return bool(self.start and start) and start != self.start
    return bool(self.start) and _start(self.pid) != self.start


@functools.cache
def _space() -> str:
  with contextlib.suppress(OSError):
    return f"{BOOT_ID.read_text().strip()} {os.readlink(NAMESPACE)}"
  return ""


def _start(pid: int) -> str:
  """Returns when a process began; "" if it has ended, even if it is still a zombie."""
  with contextlib.suppress(OSError):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
  return ""
