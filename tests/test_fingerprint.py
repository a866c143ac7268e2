"""What a run remembers of its data: what has changed when it is resumed, and what it must not be evaluated on."""

import shutil

import numpy as np
import pytest

from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.data.fingerprint import check_not_trained, find_shared, fingerprint, read_fingerprint, write_fingerprint
from univid_jax.data.media.writer import write_clip
from univid_jax.data.sources.open import open_data
from univid_jax.training import same_run


@pytest.fixture
def config(tmp_path):
  """The config of 12 pairs, of which three are held out."""
  rng = np.random.default_rng(0)
  for number in range(12):
    for side in ("source", "target"):
      path = tmp_path / "pairs" / "edges" / f"{number:02}" / f"{side}.png"
      write_clip(path, rng.integers(0, 256, (1, 8, 8, 3)).astype(np.uint8))
  return override(tiny(), {"data.pairs": str(tmp_path / "pairs"), "data.held_out": 0.25})


def describe(config):
  data = open_data(config)
  return fingerprint(data.sources, data.held_out)


def test_held_out_records_belong_to_it(config, tmp_path):
  before = describe(config)
  assert {name: source["num_records"] for name, source in before.items()} == {"pairs": 9, "held-out pairs": 3}
  assert not find_shared(before, before)
  (name,) = list(before["held-out pairs"]["records"])[:1]
  target = tmp_path / "pairs" / name / "target.png"
  write_clip(target, np.zeros((1, 8, 8, 3), np.uint8))
  after = describe(config)
  assert after["pairs"] == before["pairs"] and after["held-out pairs"] != before["held-out pairs"]


def test_copies_under_another_name_are_found(config, tmp_path):
  held_out = next(iter(describe(config)["held-out pairs"]["records"]))
  for number in range(12, 16):
    shutil.copytree(tmp_path / "pairs" / held_out, tmp_path / "pairs" / "edges" / f"{number}")
  found = describe(config)
  assert find_shared(found, found)


class TestResuming:
  def resume(self, config, workdir, monkeypatch):
    monkeypatch.setattr(same_run, "has_checkpoint", lambda _: True)
    same_run.check_same_data(str(workdir), open_data(config), config)
    return read_fingerprint(workdir)

  def test_a_run_that_did_not_record_held_out_data_does_from_now_on(self, config, tmp_path, monkeypatch):
    write_fingerprint(tmp_path, {"pairs": describe(config)["pairs"]})
    assert self.resume(config, tmp_path, monkeypatch) == describe(config)
    for path in (tmp_path / "pairs").rglob("target.png"):
      write_clip(path, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="held-out pairs had 3 records and has 3"):
      self.resume(config, tmp_path, monkeypatch)

  def test_what_was_trained_on_is_not_forgotten(self, config, tmp_path, monkeypatch, caplog):
    """Though the data may be changed, so that other pairs are held out."""
    write_fingerprint(tmp_path, describe(config))
    shutil.copytree(tmp_path / "pairs" / "edges" / "03", tmp_path / "pairs" / "edges" / "00a")
    with pytest.raises(UserError, match="has changed since the run started"):
      self.resume(config, tmp_path, monkeypatch)
    changed = override(config, {"data.allow_changed": True})
    for _ in range(2):  # resumed again, without a change
      caplog.clear()
      self.resume(changed, tmp_path, monkeypatch)
      assert "of what is held out, such as" in caplog.text
    with pytest.raises(UserError, match="was trained on"):
      check_not_trained(tmp_path, open_data(config).held_out, allowed=False)


@pytest.mark.parametrize("change", ["more pairs", "another share"])
def test_a_run_is_not_evaluated_on_what_it_was_trained_on(config, tmp_path, caplog, change):
  data = open_data(config)
  write_fingerprint(tmp_path, fingerprint(data.sources, data.held_out))
  check_not_trained(tmp_path, data.held_out, allowed=False)
  if change == "more pairs":
    shutil.copytree(tmp_path / "pairs" / "edges" / "03", tmp_path / "pairs" / "edges" / "00a")
  else:
    config = override(config, {"data.held_out": 0.5})
  held_out = open_data(config).held_out
  with pytest.raises(UserError, match=r"was trained on \d of \d records to evaluate on, such as edges/"):
    check_not_trained(tmp_path, held_out, allowed=False)
  check_not_trained(tmp_path, held_out, allowed=True)
  assert "was trained on" in caplog.text
  check_not_trained(tmp_path / "elsewhere", held_out, allowed=False)
