"""Goodput: where the time of a run goes, over restarts."""

import json
import logging
import threading
from unittest import mock

import pytest

from univid_jax.config.boundary import override
from univid_jax.training.goodput import WRITE_SECONDS, Activity, Goodput
from univid_jax.training.hooks import MeasureGoodput, SaveCheckpoint
from univid_jax.training.loop import train


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


class Step:
  """An array that is computed when it is told to be."""

  def __init__(self, goodput):
    self._goodput, self._done = goodput, threading.Event()
    goodput.watch(self)

  def block_until_ready(self):
    self._done.wait()
    return self

  def end(self):
    self._done.set()
    self._goodput._step_end.result()  # the thread has read the clock


@pytest.fixture
def clock():
  return Clock()


def start(tmp_path, clock, *, step=0):
  goodput = Goodput(tmp_path, clock=clock)
  clock.sleep(5)
  with goodput.measure(Activity.COMPILING):
    clock.sleep(7)
  goodput.resume(step)
  return goodput


def spent(goodput):
  return {str(activity): seconds for activity, seconds in goodput.seconds.items() if seconds}


def test_activities(tmp_path, clock):
  """All time is counted once; an inner activity interrupts the outer one."""
  goodput = start(tmp_path, clock)
  with goodput.measure(Activity.VALIDATING):
    clock.sleep(1)
    with goodput.measure(Activity.SAVING):
      clock.sleep(2)
    clock.sleep(4)
  clock.sleep(8)
  assert spent(goodput) == {"starting": 5, "compiling": 7, "validating": 5, "saving": 2, "other": 8}
  goodput.close()


def test_steps_are_asynchronous(tmp_path, clock):
  """Dispatching takes no time; waiting for data counts only while no step runs, and so does saving."""
  goodput = start(tmp_path, clock)
  with goodput.measure(Activity.STEPPING):
    step = Step(goodput)
  with goodput.measure(Activity.WAITING):
    clock.sleep(3)  # the step still runs
  with goodput.measure(Activity.WAITING):
    clock.sleep(1)
    step.end()
    clock.sleep(2)
  with goodput.measure(Activity.STEPPING):
    step = Step(goodput)
  with goodput.measure(Activity.SAVING):
    clock.sleep(10)
    step.end()
    clock.sleep(20)
  with goodput.measure(Activity.WAITING):
    clock.sleep(40)
  assert spent(goodput) == {"starting": 5, "compiling": 7, "stepping": 14, "waiting for data": 42, "saving": 20}
  assert goodput.share == pytest.approx(14 / 88)
  assert str(goodput) == (
    "goodput 15.9%, 14.0 s of stepping in 88.0 s: "
    "waiting for data 42.0 s, saving 20.0 s, compiling 7.0 s, starting 5.0 s"
  )
  goodput.close()


def step_for(goodput, clock, seconds):
  with goodput.measure(Activity.STEPPING):
    clock.sleep(seconds)


def test_a_kill_hides_little_however_rarely_a_run_logs(tmp_path, clock):
  goodput = start(tmp_path, clock)
  hook = MeasureGoodput(goodput)
  for _ in range(3):
    step_for(goodput, clock, WRITE_SECONDS)
    hook(mock.Mock(summary={}))
  assert json.loads((tmp_path / "goodput.json").read_text())["seconds"]["stepping"] == 3 * WRITE_SECONDS
  goodput.close()


def test_restarts(tmp_path, clock):
  """What a killed run did after the checkpoint that is resumed from is lost, whatever it was."""
  first = start(tmp_path, clock)
  step_for(first, clock, 10)
  first.keep_checkpoint(5)
  step_for(first, clock, 20)
  first.keep_checkpoint(10)
  step_for(first, clock, WRITE_SECONDS)
  first.keep()
  step_for(first, clock, 1)
  first.keep()  # too soon: this second is not known of after the kill
  second = start(tmp_path, clock, step=10)
  assert spent(second) == {"starting": 10, "compiling": 14, "stepping": 30, "lost to restarts": WRITE_SECONDS}
  step_for(second, clock, 3)
  second.close()  # an error
  third = start(tmp_path, clock, step=5)  # the checkpoint of step 10 is damaged
  # 20 s and 10 s are of the first run, the start (12 s) and 3 s of the second.
  assert spent(third) == {"starting": 10, "compiling": 14, "stepping": 10, "lost to restarts": 20 + 10 + 12 + 3}
  third.keep_checkpoint(6)
  assert sorted(json.loads((tmp_path / "goodput.json").read_text())["checkpoints"]) == ["5", "6"]
  for goodput in (first, second, third):
    goodput.close()


def test_nothing_is_lost_by_a_stop(tmp_path, clock):
  first = start(tmp_path, clock)
  step_for(first, clock, 10)
  first.keep_checkpoint(5)
  clock.sleep(2)
  first.close()
  second = start(tmp_path, clock, step=5)
  assert spent(second) == {"starting": 10, "compiling": 14, "stepping": 10, "other": 2}
  second.close()


def test_a_run_that_did_not_get_to_its_steps_changes_nothing(tmp_path, clock):
  start(tmp_path, clock).close()
  before = (tmp_path / "goodput.json").read_text()
  Goodput(tmp_path, clock=clock).close()
  assert (tmp_path / "goodput.json").read_text() == before
  Goodput(tmp_path / "other", writes=False, clock=clock).resume(0)
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seconds": 1, "checkpoints": {}}', b"\xff"])
def test_a_damaged_file_is_replaced(tmp_path, clock, content, caplog):
  (tmp_path / "goodput.json").write_bytes(content)
  start(tmp_path, clock, step=4).close()
  assert "goodput.json cannot be read" in caplog.text
  assert json.loads((tmp_path / "goodput.json").read_text())["seconds"]["compiling"] == 7


@pytest.mark.long
def test_a_resumed_run(tiny_config, tmp_path, monkeypatch, caplog):
  """A run that ends between checkpoints has lost its steps since the last; the rest of the time adds up."""
  config = override(tiny_config, {"checkpoint.every_steps": 2, "validation.every_steps": 2, "validation.previews": 0})
  save, values = SaveCheckpoint.__call__, []

  def fail(self, event):
    if event.step == 4:
      raise RuntimeError("killed")
    save(self, event)

  monkeypatch.setattr(SaveCheckpoint, "__call__", fail)
  with pytest.raises(RuntimeError, match="killed"):
    train(config, str(tmp_path))
  values.append(json.loads((tmp_path / "goodput.json").read_text()))
  monkeypatch.setattr(SaveCheckpoint, "__call__", save)
  with caplog.at_level(logging.INFO):
    train(config, str(tmp_path))
  values.append(json.loads((tmp_path / "goodput.json").read_text()))
  (line,) = [record.message for record in caplog.records if record.message.startswith("goodput")]
  assert "lost to restarts" in line and "validating" in line and "starting" in line
  first, second = (each["seconds"] for each in values)
  kept = values[0]["checkpoints"]["2"]
  assert second["lost to restarts"] == pytest.approx(sum(first.values()) - sum(kept.values()), abs=0.1)
  assert all(second[name] >= seconds for name, seconds in kept.items())
  rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(0 < row["goodput"] < 1 for row in rows)
  assert values[1]["checkpoints"].keys() == {"2", "4"}
