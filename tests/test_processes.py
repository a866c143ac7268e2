"""Signals, failures and deaths of commands, of one process and of several that belong together."""

import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import finish, free_port, start_command, start_python
from univid_jax.checkpoints.orbax_files import silence_orbax
from univid_jax.core.process_identity import ProcessIdentity
from univid_jax.runtime.main_thread import MainThread
from univid_jax.runtime.peers import Peers
from univid_jax.runtime.relay import Relay
from univid_jax.runtime.safe_points import SafePoints


def start_loop(tmp_path, *arguments, count=1):
  """Starts tests.loop_command in one or more processes."""
  port, options = free_port(), [f"--workdir={tmp_path}", *arguments]
  for index in range(count):
    group = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
    yield start_command("tests.loop_command", *options, *(group if count > 1 else []))


def wait_until_ready(*processes):
  for process in processes:
    while (line := process.stdout.readline()) and line != "ready\n":
      pass
    assert line, process.communicate()


def reported(done):
  """The lines of a command that tell how it ended."""
  return [line for line in done.stderr.splitlines() if line]


class TestSignals:
  @pytest.mark.parametrize("mode", ["loop", pytest.param("python", marks=pytest.mark.long), "compile", "destructor"])
  def test_sigterm_ends_a_command_with_75_wherever_it_is(self, tmp_path, mode):
    """In a loop at the next step; elsewhere at once, even where no Python runs, or where it ignores exceptions."""
    (process,) = start_loop(tmp_path, f"--mode={mode}")
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    done = finish(process)
    assert done.returncode == 75 and time.monotonic() - start < 10, done
    steps = tmp_path / "steps-0"
    ending = f" at step {steps.read_text()}" if mode == "loop" else "; rerun the same command to continue"
    assert reported(done) == [f"stopped by SIGTERM{ending}"]
    assert not (tmp_path / ".lock-0").exists()

  @pytest.mark.parametrize("continues, ending", [(True, "; rerun the same command to continue"), (False, "")])
  def test_only_what_continues_says_so(self, continues, ending):
    script = (
      "import os, signal, time; from univid_jax.cli import app, flags\n"
      f"@app.command(flags.CommandFlags(''), continues={continues})\n"
      "def main():\n"
      "  os.kill(os.getpid(), signal.SIGTERM)\n"
      "  time.sleep(10)\n"
      "raise SystemExit(main())"
    )
    done = finish(start_python("-c", script))
    assert done.returncode == 75 and reported(done) == [f"stopped by SIGTERM{ending}"]

  def test_a_signal_after_the_end_changes_nothing(self, tmp_path):
    (process,) = start_loop(tmp_path, "--mode=exit")
    done = finish(process)
    assert done.returncode == 0 and not done.stderr

  def test_the_second_ctrl_c_does_not_wait(self, tmp_path):
    (process,) = start_loop(tmp_path, "--mode=compile")
    wait_until_ready(process)
    for _ in range(2):
      process.send_signal(signal.SIGINT)
      time.sleep(0.1)
    assert finish(process).returncode == 130


def test_a_hook_that_a_library_has_installed_meanwhile_stays(monkeypatch):
  """Orbax is silenced by one, and what it abandons may be collected long after the command."""
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", seen.append)
  thread = MainThread(lambda name: None)
  with thread.listen():
    silence_orbax()
  thread.close()
  for error in (RuntimeError("Event loop is closed"), RuntimeError("other")):
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=error))
  assert [str(each.exc_value) for each in seen] == ["other"]


class TestSafePoints:
  @given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 3))
  @settings(max_examples=30, deadline=None)
  def test_all_stop_at_a_point_that_none_has_passed(self, delays, first):
    """Loops of different speed are asked to stop at different times; all stop after the same number of points."""
    loops, stopped = [SafePoints() for _ in delays], [0] * len(delays)
    entered = [threading.Event() for _ in delays]

    def run(index):
      loops[index].enter()
      entered[index].set()
      while not loops[index].reach():
        stopped[index] += 1
        time.sleep(delays[index] * 1e-4)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(loops))]
    for thread in threads:
      thread.start()
    assert all(event.wait(timeout=10) for event in entered)
    order = sorted(range(len(loops)), key=lambda index: (index + first) % len(loops))
    progress = []
    for index in order:
      progress.append(loops[index].freeze())
      time.sleep(delays[index] * 1e-4)
    assert not any(points.decide(progress) for points in loops)
    for thread in threads:
      thread.join(timeout=10)
    assert set(stopped) == {max(progress)}

  def test_before_the_loop_and_after_it_processes_stop_at_once(self):
    inside, outside, beyond = SafePoints(), SafePoints(), SafePoints()
    inside.enter()
    beyond.leave()
    assert inside.decide([0, outside.freeze()]) and outside.decide([0, outside.freeze()])
    inside, progress = SafePoints(), beyond.freeze()
    inside.enter()
    assert beyond.decide([3, progress]) and not inside.decide([3, progress])
    assert not any(inside.reach() for _ in range(100))  # it finishes its steps


class DictStore:
  """`peers.Store` in memory."""

  def __init__(self):
    self.values = {}

  def create(self, key, value):
    self.values.setdefault(key, value)

  def replace(self, key, value):
    self.values[key] = value

  def read(self, folder):
    return {key.removeprefix(f"{folder}/"): value for key, value in self.values.items() if key.startswith(f"{folder}/")}


class TestPeers:
  @pytest.fixture
  def pair(self):
    pair = [Peers(DictStore(), index=index, count=2, heartbeat_seconds=10) for index in (0, 1)]
    pair[1]._store = pair[0]._store
    starts = [threading.Thread(target=peers.start) for peers in pair]
    for thread in starts:
      thread.start()
    for thread in starts:
      thread.join()
    yield pair
    for peers in pair:
      peers.stop()

  def wait_for(self, condition):
    start = time.monotonic()
    while not (result := condition()):
      assert time.monotonic() - start < 10
      time.sleep(0.01)
    return result

  def read_store(self, peers):
    """Waits until `peers` knows everything that is in the store now."""
    finished = peers._exchanges + 1  # the current exchange may have read before now

    def has_read():
      peers._wake.set()
      return peers._exchanges > finished

    self.wait_for(has_read)

  def test_a_silent_process_is_named_after_the_heartbeat(self, pair):
    first, second = pair
    self.wait_for(lambda: "1" in first._beats)
    assert first.find_dead(3600) is None and second.find_dead(3600) is None
    second.stop()
    self.read_store(first)
    first.find_dead(0)
    assert first.find_dead(9) is None
    message = first.find_dead(1.5)
    assert message.startswith(
      f"process 1 ({socket.gethostname()}, pid {os.getpid()}) has not responded for 10 s; rerun"
    )

  def test_after_a_failed_collective_five_seconds_are_enough(self, pair):
    first, second = pair
    first.post("suspicion")
    self.wait_for(lambda: "suspicion" in second.events)
    second.stop()
    self.read_store(first)
    first.find_dead(0)
    assert first.find_dead(4) is None and "process 1" in first.find_dead(2)

  def test_a_killed_process_of_this_machine_is_named_at_once(self, pair, monkeypatch):
    child = start_python("-c", "import time; time.sleep(60)")
    identity = ProcessIdentity.current()
    other = ProcessIdentity(identity.host, child.pid, identity.space, "")
    first, second = pair
    first._identities[1] = other
    first.post("wake")
    self.wait_for(lambda: "wake" in second.events)
    assert first.find_dead(0) is None
    child.kill()
    finish(child)
    message = self.wait_for(lambda: first.find_dead(0))
    assert f"pid {child.pid}) has died" in message and first.gone == {1}

  def test_a_process_that_has_left_is_not_dead(self, pair):
    first, second = pair
    second.post("left/1")
    self.wait_for(lambda: first.gone == {1})
    second.stop()
    assert first.find_dead(0) is None and first.find_dead(3600) is None

  def test_the_first_of_several_events_counts(self, pair):
    first, second = pair
    first.post("stop", process=0)
    self.wait_for(lambda: first.has_posted)
    second.post("stop", process=1)
    self.wait_for(lambda: second.has_posted)
    for peers in (first, second):
      assert self.wait_for(lambda peers=peers: peers.events.get("stop")) == {"process": 0}


class TestRelay:
  @pytest.fixture
  def ends(self):
    """A relay, the coordinator's end of a connection through it, and the client's end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
      relay = Relay(f"127.0.0.1:{server.getsockname()[1]}")
      host, port = relay.address.split(":")
      client = socket.create_connection((host, int(port)))
      coordinator, _ = server.accept()
      yield relay, coordinator, client
      coordinator.close()
      client.close()

  def test_keeps_the_connection_when_the_coordinator_is_gone(self, ends):
    relay, coordinator, client = ends
    client.sendall(b"question")
    assert coordinator.recv(64) == b"question"
    coordinator.sendall(b"answer")
    assert client.recv(64) == b"answer" and not relay.lost.is_set()
    coordinator.close()
    assert relay.lost.wait(5)
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
      client.recv(64)

  def test_keeps_the_connection_when_sending_fails(self, monkeypatch):
    """The client may send before the end of the coordinator is noticed: both wake up together after a suspension."""
    with socket.create_server(("127.0.0.1", 0)) as server:
      (client, end), (coordinator, other) = [
        (socket.create_connection(server.getsockname()), server.accept()[0]) for _ in range(2)
      ]
    other.close()
    coordinator.shutdown(socket.SHUT_WR)  # sending fails
    relay = object.__new__(Relay)
    monkeypatch.setattr(relay, "_reach_coordinator", lambda: coordinator)
    monkeypatch.setattr(relay, "_start", lambda *_: None)  # the other thread comes later
    thread = threading.Thread(target=relay._connect, args=(end,))
    thread.start()
    client.sendall(b"heartbeat")
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
      client.recv(64)
    client.close()
    thread.join(timeout=5)
    assert not thread.is_alive()

  def test_a_connection_that_the_client_closes_is_not_lost(self, ends):
    relay, coordinator, client = ends
    coordinator.sendall(b"hello")
    assert client.recv(64) == b"hello"
    client.close()
    assert coordinator.recv(64) == b""
    coordinator.close()
    assert not relay.lost.wait(0.3)


class TestTwoProcesses:
  """Through JAX's coordination service; tests/test_train.py does the same with training."""

  def test_sigterm_to_one_stops_both_at_the_same_step(self, tmp_path):
    processes = list(start_loop(tmp_path, count=2))
    wait_until_ready(*processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = map(finish, processes)
    steps = [(tmp_path / f"steps-{index}").read_text() for index in (0, 1)]
    assert steps[0] == steps[1] and (first.returncode, second.returncode) == (75, 75), (first, second)
    assert reported(first) == [f"stopped by SIGTERM to process 1 at step {steps[0]}"]
    assert reported(second) == [f"stopped by SIGTERM at step {steps[0]}"]

  def test_when_the_first_dies_before_all_have_joined_the_others_end(self, tmp_path):
    """JAX would wait for five minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
      address = f"127.0.0.1:{server.getsockname()[1]}"
      options = [f"--workdir={tmp_path}", f"--coordinator={address}", "--num_processes=3", "--process_id=1"]
      process = start_command("tests.loop_command", *options)
      server.settimeout(60)
      connection, _ = server.accept()
      connection.recv(64)
      connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # HTTP/2 settings
      connection.close()
      done = finish(process)
    assert done.returncode == 1
    reason = f"process 0 at {address} ended before all processes had joined; rerun the same command to resume"
    assert reported(done) == [f"error: {reason}"]

  @pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
  def test_when_one_is_killed_the_other_names_it(self, tmp_path, victim):
    """JAX would abort with a stack trace, at once when process 0 dies and after its own timeout otherwise."""
    processes = list(start_loop(tmp_path, "--heartbeat_seconds=5", count=2))
    wait_until_ready(*processes)
    processes[victim].kill()
    processes[victim].communicate()
    start = time.monotonic()
    done = finish(processes[1 - victim])
    assert done.returncode == 1 and time.monotonic() - start < 10, done
    assert len(reported(done)) == 1, done.stderr
    assert done.stderr.startswith(f"error: process {victim} (") and f"pid {processes[victim].pid}" in done.stderr

  @pytest.mark.long
  def test_an_error_in_one_ends_both(self, tmp_path):
    processes = list(start_loop(tmp_path, "--mode=fail", count=2))
    start = time.monotonic()
    first, second = map(finish, processes)
    assert first.returncode == second.returncode == 1 and time.monotonic() - start < 40
    assert reported(second) == ["error: the second process cannot go on"]
    (line,) = reported(first)
    assert line.startswith("error: process 1 (") and line.endswith("failed: the second process cannot go on")

  @pytest.mark.long
  @pytest.mark.parametrize("suspended", [0, 1])
  def test_a_suspended_process_is_named_and_ends_too(self, tmp_path, suspended):
    processes = list(start_loop(tmp_path, "--heartbeat_seconds=5", count=2))
    wait_until_ready(*processes)
    processes[suspended].send_signal(signal.SIGSTOP)
    other = finish(processes[1 - suspended])
    assert other.returncode == 1 and f"process {suspended} (" in reported(other)[0], other
    processes[suspended].send_signal(signal.SIGCONT)
    assert finish(processes[suspended]).returncode == 1

  @pytest.mark.long
  def test_a_short_suspension_does_no_harm(self, tmp_path):
    processes = list(start_loop(tmp_path, "--heartbeat_seconds=10", "--steps=200", count=2))
    wait_until_ready(*processes)
    for process in processes:
      process.send_signal(signal.SIGSTOP)
      time.sleep(4)
      process.send_signal(signal.SIGCONT)
    assert [finish(process).returncode for process in processes] == [0, 0]

  @pytest.mark.long
  def test_the_same_command_twice_leaves_the_first_alone(self, tmp_path):
    """Also with the port of the first: JAX would end both."""
    (process,) = start_loop(tmp_path)
    wait_until_ready(process)
    (again,) = start_loop(tmp_path)
    done = finish(again)
    assert done.returncode == 1
    (line,) = reported(done)
    assert line.startswith(f"error: {tmp_path} is in use by process {process.pid} on {socket.gethostname()}, last seen")
    process.kill()
    process.communicate()
    (again,) = start_loop(tmp_path, "--steps=1")
    assert finish(again).returncode == 0
