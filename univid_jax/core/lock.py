"""Locks on folders, so that no two commands write to one workdir.

A lock is a file with the host, process id and last heartbeat of its owner, which renews the heartbeat. A process that
finds it can tell whether the owner is alive:

- On the same machine: by whether the process exists, so a killed command can be rerun at once.
- On another machine: by whether the heartbeat changes within `SILENCE`. No clocks are compared.

The file is created exclusively: locally by the file system, in a bucket on the condition that there is no such object
(gcsfs turns fsspec's mode "create" into ifGenerationMatch = 0). A stale lock is deleted and created again; the slower
of two processes fails. An owner that was suspended and lost its lock finds another token in the file, and `on_loss`
reports it.
"""

import contextlib
import dataclasses
import datetime
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import fsspec
from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.paths import bucket_errors, is_remote, to_path
from univid_jax.core.process_identity import ProcessIdentity

log = logging.getLogger(__name__)

# In seconds.
BEAT = 15.0
# An owner on another machine counts as dead after this long without a heartbeat. NFS may show files a minute late.
SILENCE = 90.0
# How long an owner on this machine may take to exit, and a new lock to be filled.
PATIENCE = 5.0
POLL = 0.5

# Fixed, so that a heartbeat needs no more room on a full disk.
SIZE = 512


@runtime_checkable
class LockFile(Protocol):
  """The operations on the file."""

  def create(self, data: bytes) -> None:
    """Creates the file; raises FileExistsError if it exists."""
    ...

  def read(self) -> bytes:
    """Returns the contents; raises FileNotFoundError if the file does not exist."""
    ...

  def write(self, data: bytes) -> None: ...

  def delete(self) -> None: ...


class LocalLockFile:
  """A file on a file system; deleting it also removes the folders that were created for it, if they are empty."""

  def __init__(self, path: Path):
    self._path = path
    self._created: list[Path] = []

  def create(self, data: bytes) -> None:
    folders = [folder for folder in self._path.parents if not folder.exists()]
    self._created += folders
    with self._open_new() as file:
      try:
        file.write(data)
      except OSError as error:
        self.delete()
        error.filename = str(self._path.parent)
        raise

  def _open_new(self) -> io.FileIO:
    while True:
      try:
        self._path.parent.mkdir(parents=True, exist_ok=True)
      except FileNotFoundError as error:  # for example in /proc
        raise FileNotFoundError(error.errno, f"cannot create the folder {self._path.parent}") from error
      with contextlib.suppress(FileNotFoundError):  # another process has removed its empty folder meanwhile
        return self._path.open("xb", buffering=0)

  def read(self) -> bytes:
    return self._path.read_bytes()

  def write(self, data: bytes) -> None:
    with self._path.open("r+b", buffering=0) as file:
      file.write(data)

  def delete(self) -> None:
    self._path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
      while self._created:
        self._created.pop(0).rmdir()


class RemoteLockFile:
  """An object in a bucket; all errors are OSErrors, as on a disk."""

  def __init__(self, url: str):
    self._url = url
    self._files, self._path = fsspec.core.url_to_fs(url)

  def create(self, data: bytes) -> None:
    with bucket_errors(self._url):
      self._files.pipe_file(self._path, data, mode="create")

  def read(self) -> bytes:
    with bucket_errors(self._url):
      return self._files.cat_file(self._path)

  def write(self, data: bytes) -> None:
    with bucket_errors(self._url):
      self._files.pipe_file(self._path, data)

  def delete(self) -> None:
    with contextlib.suppress(FileNotFoundError), bucket_errors(self._url):
      self._files.rm_file(self._path)


@dataclasses.dataclass(frozen=True)
class Owner:
  """The contents of a lock file.

  Attributes:
    process: the holder.
    token: distinguishes this lock from all others.
    heartbeat: local time of the last heartbeat, for readers.
    count: number of heartbeats.
  """

  process: ProcessIdentity
  token: str
  heartbeat: str
  count: int

  def encode(self) -> bytes:
    return json.dumps(dataclasses.asdict(self)).encode().ljust(SIZE)

  @classmethod
  def decode(cls, data: bytes) -> "Owner | None":
    """Returns the owner; None for an incomplete file."""
    try:
      values = parse_json(data)
      return cls(**{**values, "process": ProcessIdentity(**values["process"])})
    except (ValueError, TypeError, KeyError):
      return None


class Lock:
  """A lock that this process holds.

  Args:
    folder: the folder or bucket to lock.
    process: index of this process in its run; each has its own lock.
    on_loss: called from another thread with a message if another process takes the lock.
  """

  def __init__(self, folder: epath.PathLike, *, process: int = 0, on_loss: Callable[[str], None] | None = None):
    self._folder, self._on_loss = str(folder), on_loss
    url = _url(folder, f".lock-{process}")
    self._file: LockFile = RemoteLockFile(url) if is_remote(folder) else LocalLockFile(Path(url))
    self._owner = Owner(ProcessIdentity.current(), uuid.uuid4().hex, _now(), 0)
    self._stop = threading.Event()
    self._beats = threading.Thread(target=self._keep, name="lock", daemon=True)

  def acquire(self) -> None:
    """Takes the lock; waits as long as it is not clear whether its owner is alive.

    Raises:
      UserError: another process holds it.
      OSError: the folder cannot be written.
    """
    is_replacement = False
    while True:
      try:
        self._file.create(self._owner.encode())
      except FileExistsError:
        self._wait_for_end()
        self._file.delete()
        is_replacement = True
        continue
      if is_replacement:
        time.sleep(POLL)  # another process that found the old lock may delete this one
      if not is_replacement or self._is_own():
        break
    self._beats.start()

  def release(self) -> None:
    """Releases the lock; a lock that was lost is left alone."""
    self._stop.set()
    if self._beats.ident and self._beats is not threading.current_thread():
      self._beats.join(timeout=POLL)
    with contextlib.suppress(OSError):
      if self._is_own():
        self._file.delete()

  def _wait_for_end(self) -> None:
    """Returns when the owner of the existing lock has ended; raises UserError if it is alive."""
    with contextlib.suppress(FileNotFoundError):
      owner, since = Owner.decode(self._file.read()), time.monotonic()
      if owner and not owner.process.is_local:
        log.info(
          "%s is locked by %s; waiting up to %.0f s to see if it still runs", self._folder, owner.process, SILENCE
        )
      while not (owner and owner.process.has_ended):
        is_remote_process = owner is not None and not owner.process.is_local
        if time.monotonic() - since >= (SILENCE if is_remote_process else PATIENCE):
          if owner and not is_remote_process:
            raise self._in_use(owner)
          return
        time.sleep(POLL)
        found = Owner.decode(self._file.read())
        if not (owner and found and found.token == owner.token):
          if found != owner:
            owner, since = found, time.monotonic()
        elif found.count != owner.count and is_remote_process:
          raise self._in_use(found)

  def _in_use(self, owner: Owner) -> UserError:
    return UserError(
      f"{self._folder} is in use by {owner.process}, last seen at {owner.heartbeat}: wait for it, end it, or write to "
      "another folder"
    )

  def _is_own(self) -> bool:
    try:
      owner = Owner.decode(self._file.read())
    except FileNotFoundError:
      return False
    return owner is not None and owner.token == self._owner.token

  def _keep(self) -> None:
    """Renews the heartbeat until the lock is released or lost."""
    while not self._stop.wait(BEAT):
      try:
        if not self._renew():
          if self._on_loss and not self._stop.is_set():
            self._on_loss(f"another process took over {self._folder} while this one did not respond")
          return
      except OSError as error:
        log.debug("the lock of %s could not be renewed: %s", self._folder, error)  # the next heartbeat may succeed

  def _renew(self) -> bool:
    """Returns whether the lock is still held."""
    self._owner = dataclasses.replace(self._owner, heartbeat=_now(), count=self._owner.count + 1)
    try:
      if not self._is_own():
        self._file.create(self._owner.encode())  # it was deleted
      else:
        self._file.write(self._owner.encode())
    except FileExistsError:
      return False
    return True


_held: dict[str, Lock] = {}


@contextlib.contextmanager
def hold(folder: epath.PathLike, *, process: int = 0, on_loss: Callable[[str], None] | None = None) -> Iterator[None]:
  """Holds the lock of a folder; does nothing if this process holds it already.

  Args:
    folder, process, on_loss: see `Lock`.

  Raises:
    UserError: another process holds it.
    OSError: the folder cannot be written.
  """
  url = _url(folder)
  if url in _held:
    yield
    return
  lock = Lock(folder, process=process, on_loss=on_loss)
  lock.acquire()
  _held[url] = lock
  try:
    yield
  finally:
    del _held[url]
    lock.release()


def release_all() -> None:
  """Releases all locks of this process, just before it exits without cleanup."""
  for lock in list(_held.values()):
    lock.release()


def _url(folder: epath.PathLike, *parts: str) -> str:
  path = str(folder) if is_remote(to_path(folder)) else os.path.realpath(folder)
  return "/".join([path.rstrip("/"), *parts])


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
