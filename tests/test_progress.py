"""How far long tasks are."""

import types

import pytest

from univid_jax.data import progress
from univid_jax.data.progress import Progress


@pytest.fixture
def clock(monkeypatch):
  clock = types.SimpleNamespace(now=0.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(progress, "time", clock)
  return clock


def run(clock, caplog, seconds, clips_per_second):
  """Passes ten sentences a second; the first 1,000 have nothing to do."""
  with caplog.at_level("INFO", "univid_jax"), Progress("clips", 4000, unit="clips", step="sentences") as bar:
    for second in range(seconds):
      clock.now = float(second)
      bar.update(10 * second, max(0, second - 100) * clips_per_second)
  return caplog.messages


def test_a_line_a_minute_with_recent_rates(clock, caplog):
  lines = run(clock, caplog, 181, 3)
  assert lines == [
    "clips: 600 of 4,000 sentences, 0 done (0 clips/s), 05:40 left",
    "clips: 1,200 of 4,000 sentences, 60 done (1 clips/s), 04:40 left",
    "clips: 1,800 of 4,000 sentences, 240 done (3 clips/s), 03:40 left",
  ]


def test_process_0_reports_for_itself(clock, caplog, monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 8)
  assert run(clock, caplog, 61, 3)[0].endswith("0 done (0 clips/s in this process, one of 8), 05:40 left")
  monkeypatch.setattr("jax.process_index", lambda: 1)
  caplog.clear()
  assert run(clock, caplog, 181, 3) == []


def test_a_bar_on_a_terminal(clock, caplog, capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  assert run(clock, caplog, 181, 3) == []
  assert "1800/4000 sentences, 240 done (3 clips/s), 03:40 left" in capsys.readouterr().err
