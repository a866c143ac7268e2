"""Locks on folders: one writer at a time, whatever became of the one before."""

import dataclasses
import json
import os
import signal
import threading
import time

import fsspec
import pytest

from tests.commands import finish, start_python
from univid_jax.core import lock, process_identity
from univid_jax.core.errors import UserError
from univid_jax.core.lock import LocalLockFile, Lock, Owner, RemoteLockFile, hold
from univid_jax.core.process_identity import ProcessIdentity

OTHER_MACHINE = {"host": "elsewhere", "space": "another boot"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  for name, seconds in (("BEAT", 0.02), ("SILENCE", 0.3), ("PATIENCE", 0.1), ("POLL", 0.01)):
    monkeypatch.setattr(lock, name, seconds)


@pytest.fixture(params=["local", "remote"])
def file(request, tmp_path, monkeypatch):
  """The lock file of tmp_path; a stand-in for a bucket is fsspec's file system in memory, which creates exclusively."""
  if request.param == "local":
    yield LocalLockFile(tmp_path / ".lock-0")
    return
  monkeypatch.setattr(lock, "LocalLockFile", lambda path: RemoteLockFile(f"memory:/{path}"))
  yield RemoteLockFile(f"memory:/{tmp_path}/.lock-0")
  fsspec.filesystem("memory").store.clear()


def write_owner(file, **changes):
  """Writes the lock of another owner, by default a living one of this machine."""
  owner = Owner.decode(file.read())
  process = dataclasses.replace(owner.process, **changes.pop("process", {}))
  file.write(dataclasses.replace(owner, process=process, token="another", **changes).encode())


def test_only_one_process_holds_it(file, tmp_path):
  with hold(tmp_path):
    values = json.loads(file.read())
    assert values["process"]["pid"] and values["process"]["host"] and values["heartbeat"]
    with pytest.raises(UserError, match=rf"in use by process {values['process']['pid']} on .*, last seen at 20"):
      Lock(tmp_path).acquire()
    with hold(tmp_path):  # by the same process
      pass
    assert file.read()
    other = Lock(tmp_path, process=1)  # of the same run
    other.acquire()
    other.release()
  with pytest.raises(FileNotFoundError):
    file.read()


def test_of_many_at_once_one_gets_it(file, tmp_path):
  file.create(b"")  # by a process that was killed before it could fill the file
  results = []

  def acquire():
    try:
      Lock(tmp_path).acquire()
      results.append(True)
    except UserError:
      results.append(False)

  threads = [threading.Thread(target=acquire) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert results.count(True) == 1


def test_a_killed_owner_of_this_machine_is_replaced_at_once(tmp_path):
  code = (
    "import sys, time; from univid_jax.core import lock\nwith lock.hold(sys.argv[1]): print(flush=True); time.sleep(60)"
  )
  owner = start_python("-c", code, tmp_path)
  owner.stdout.readline()
  with pytest.raises(UserError, match=f"in use by process {owner.pid}"):
    Lock(tmp_path).acquire()
  owner.send_signal(signal.SIGKILL)
  finish(owner)
  with hold(tmp_path):
    assert json.loads((tmp_path / ".lock-0").read_bytes())["process"]["pid"] == os.getpid()


def test_a_number_that_was_given_again_is_another_process(file, tmp_path):
  Lock(tmp_path).acquire()
  own = Owner.decode(file.read()).process
  write_owner(file, process={"start": "1"})
  with hold(tmp_path):
    assert Owner.decode(file.read()).process == own


class TestOtherMachine:
  def test_an_owner_that_beats_is_alive(self, file, tmp_path):
    Lock(tmp_path).acquire()
    stop = threading.Event()

    def beat():
      count = 0
      while not stop.wait(0.02):
        write_owner(file, process=OTHER_MACHINE, count=(count := count + 1))

    write_owner(file, process=OTHER_MACHINE)
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"in use by process .* on elsewhere"):
      Lock(tmp_path).acquire()
    stop.set()
    thread.join()

  def test_one_that_is_silent_is_replaced(self, file, tmp_path, caplog):
    first = Lock(tmp_path)
    first.acquire()
    first._stop.set()
    first._beats.join()
    write_owner(file, process=OTHER_MACHINE, heartbeat="2030-01-01T00:00:00+00:00")  # clocks do not matter
    with caplog.at_level("INFO"), hold(tmp_path):
      assert "is locked by process" in caplog.text and "on elsewhere; waiting" in caplog.text


class TestOwner:
  def test_renews_its_heartbeat(self, file, tmp_path):
    with hold(tmp_path):
      counts = set()
      wait_until(lambda: counts.add(json.loads(file.read())["count"]) or len(counts) == 3)

  def test_hears_of_its_loss_and_leaves_the_new_lock_alone(self, file, tmp_path):
    heard = threading.Event()
    with hold(tmp_path, on_loss=lambda message: heard.set()):
      write_owner(file)
      assert heard.wait(5)
    assert Owner.decode(file.read()).token == "another"

  def test_takes_a_deleted_lock_again(self, file, tmp_path):
    heard = threading.Event()
    with hold(tmp_path, on_loss=lambda message: heard.set()):
      file.delete()
      wait_until(lambda: exists(file))
      with pytest.raises(UserError, match="in use"):
        Lock(tmp_path).acquire()
      assert not heard.is_set()


class HttpError(Exception):
  """As gcsfs raises after its retries: no OSError."""


class TestFailingBucket:
  """What a bucket's library raises may be no OSError."""

  @pytest.fixture
  def failures(self, monkeypatch):
    """The names of the operations that fail."""
    names = set()
    files = fsspec.filesystem("memory")

    def failing(name, operation):
      def call(*args, **kwargs):
        if name in names:
          raise HttpError("Service Unavailable, 503")
        return operation(*args, **kwargs)

      return call

    for name in ("pipe_file", "cat_file", "rm_file"):
      monkeypatch.setattr(files, name, failing(name, getattr(files, name)))
    return names

  @pytest.mark.parametrize("file", ["remote"], indirect=True)
  def test_the_heartbeat_goes_on(self, file, tmp_path, failures):
    heard = threading.Event()
    with hold(tmp_path, on_loss=lambda message: heard.set()):
      for name in ("cat_file", "pipe_file"):
        failures.add(name)
        time.sleep(0.1)
        failures.clear()
        count = Owner.decode(file.read()).count
        wait_until(lambda count=count: Owner.decode(file.read()).count > count)
      write_owner(file)  # and the loss of the lock is heard of
      assert heard.wait(5)

  @pytest.mark.parametrize("file", ["remote"], indirect=True)
  @pytest.mark.parametrize("name", ["cat_file", "rm_file"])
  def test_a_release_that_fails_is_no_error(self, file, tmp_path, failures, name):
    with hold(tmp_path):
      failures.add(name)

  @pytest.mark.parametrize("file", ["remote"], indirect=True)
  def test_a_lock_that_cannot_be_written_is_an_os_error(self, file, tmp_path, failures):
    failures.add("pipe_file")
    with pytest.raises(OSError, match=r"HttpError: Service Unavailable, 503: '.*\.lock-0'") as error:
      Lock(tmp_path).acquire()
    assert isinstance(error.value.__cause__, HttpError)


def wait_until(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f"this was not so within {seconds:g} s"


def exists(file):
  try:
    return bool(file.read())
  except FileNotFoundError:
    return False


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="file"), hold(tmp_path / "file"):
    pass


def test_folders_that_stay_empty_are_removed(tmp_path):
  """So a command that fails before it writes anything leaves no folder."""
  with hold(tmp_path / "a" / "b"):
    assert (tmp_path / "a" / "b").is_dir()
  assert not (tmp_path / "a").exists()
  with hold(tmp_path / "a" / "b"):
    (tmp_path / "a" / "file").touch()
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
  (tmp_path / "empty").mkdir()
  with hold(tmp_path / "empty"):
    pass
  assert (tmp_path / "empty").is_dir(), "it was there before"


def test_a_process_that_another_user_hides_has_not_ended(monkeypatch):
  """As where /proc is mounted with hidepid: it cannot be signalled, and its start cannot be read."""

  def refuse(pid, signal):
    raise PermissionError

  process = ProcessIdentity.current()
  monkeypatch.setattr(process_identity.os, "kill", refuse)
  monkeypatch.setattr(process_identity, "_start", lambda pid: "")
  assert not process.has_ended
