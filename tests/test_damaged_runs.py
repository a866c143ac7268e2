"""Damaged checkpoints of a run: another one is used, and nothing is lost."""

import contextlib
import errno
import json
import logging
import os
import shutil
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import finish, free_port, start_python
from tests.helpers import parameters
from tests.test_checksums import flip_bit, list_files, run_verify
from univid_jax.checkpoints import checksums, saved
from univid_jax.checkpoints.checksums import CHECKSUMS_FILE, DamagedError, find_damage, hash_file
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run import Checkpointer, RunRecord, write_run
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import find_step
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.options import OnDamaged
from univid_jax.data.rows.loader import Loader
from univid_jax.inference.load import load_pipeline
from univid_jax.training.loop import restore_or_create_state, train
from univid_jax.training.setup import Run


class Stream:
  """Numbers, with a position as the loader has."""

  def __init__(self):
    self._numbers = iter(grain.MapDataset.range(100).to_iter_dataset())

  def __next__(self):
    return next(self._numbers)

  def get_state(self):
    return json.dumps(self._numbers.get_state()).encode()

  def set_state(self, states):
    self._numbers.set_state(json.loads(states[jax.process_index()]))


def open_stream(position=0):
  stream = Stream()
  for _ in range(position):
    next(stream)
  return stream


def arrays(step):
  return {"kernel": jnp.full((8, 8), step, jnp.float32), "bias": jnp.arange(5) + step}


def save(workdir, steps, *, keep=3):
  """Saves small checkpoints as a run does, each with a validation loss."""
  with contextlib.closing(Checkpointer(workdir, keep=keep)) as checkpointer:
    for step in steps:
      model, training = arrays(step), {"step": jnp.asarray(step), "moments": arrays(-step)}
      checkpointer.save(step, model=model, training=training, data=open_stream(step), val_loss=1 / step)


def resume(workdir, **options):
  """Restores a checkpoint as a run does; returns its step, after checking that everything is of that step."""
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays(0))
  scalar = jnp.asarray(0)
  training = {"step": jax.ShapeDtypeStruct((), scalar.dtype, sharding=scalar.sharding), "moments": abstract}
  stream = open_stream()
  with contextlib.closing(Checkpointer(workdir, **options)) as checkpointer:
    model, training = checkpointer.restore(model=abstract, training=training, data=stream)
  step = int(training["step"])
  for found, expected in ((model, arrays(step)), (training["moments"], arrays(-step))):
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
  assert next(stream) == step
  return step


@pytest.fixture
def workdir(tmp_path):
  """Checkpoints of the steps 2 and 4."""
  save(tmp_path, [2, 4])
  return tmp_path


def damage(workdir, step=4, item="model"):
  """Flips a bit of the largest file of an item; returns its name in the checkpoint."""
  folder = workdir / "checkpoints" / str(step)
  files = [path for path in list_files(folder / item) if path.name != "commit_success.txt"]
  path = max(files, key=lambda path: path.stat().st_size)
  flip_bit(path)
  return str(path.relative_to(folder))


def folders(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_every_file_of_a_checkpoint(workdir):
  """A flipped bit anywhere is noticed, and the message names the file."""
  folder, rng = workdir / "checkpoints" / "4", np.random.default_rng()
  files = list_files(folder)
  assert {path.relative_to(folder).parts[0] for path in files} >= {"model", "training", "data", "metrics"}
  for path in files:
    contents = flip_bit(path, rng)
    with pytest.raises(DamagedError, match=rf"{path.relative_to(folder)} \(.*checksum differs\)"):
      SavedCheckpoints(workdir, on_damaged=OnDamaged.STOP).read(None, lambda folder: None)
    path.write_bytes(contents)
  assert resume(workdir) == 4


@pytest.mark.parametrize("item", ["model", "training", "data", "metrics"])
def test_resuming(workdir, caplog, item):
  """The newest that is intact is used; the other is kept under another name, and its step is saved again."""
  name = damage(workdir, item=item)
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == 2
  assert (
    f"{workdir}/checkpoints/4 is damaged: {name} (checksum differs); the checkpoint of step 2 is used" in caplog.text
  )
  assert folders(workdir) == ["2", "4.damaged"]
  save(workdir, [4])
  assert resume(workdir) == 4 and find_damage(workdir / "checkpoints" / "4.damaged") == [f"{name} (checksum differs)"]
  damage(workdir, item=item)
  assert resume(workdir) == 2 and folders(workdir) == ["2", "4.damaged", "4.damaged-2"]
  assert resume(workdir) == 2


def test_stop(workdir):
  damage(workdir)
  with pytest.raises(DamagedError, match=r"checksum differs.*; --on_damaged_checkpoint=fallback uses the newest"):
    resume(workdir, on_damaged=OnDamaged.STOP)
  assert folders(workdir) == ["2", "4"]


def test_none_is_intact(workdir):
  damage(workdir, 2), damage(workdir, 4)
  for use in (lambda: resume(workdir), lambda: find_step(workdir, None)):
    with pytest.raises(DamagedError, match=r"4 is damaged.*checksum differs.*no older checkpoint is intact"):
      use()
  assert folders(workdir) == ["2", "4"]


@pytest.mark.parametrize("contents", [b"", b'{"next', b"{}", None])
@pytest.mark.parametrize("name", ["data/process_0-of-1.json", "model/manifest.ocdbt"])
def test_damage_without_checksums(workdir, caplog, contents, name):
  """What cannot be read is damaged."""
  for step in (2, 4):
    (workdir / "checkpoints" / str(step) / CHECKSUMS_FILE).unlink()
  path = workdir / "checkpoints" / "4" / name
  path.unlink() if contents is None else path.write_bytes(contents)
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == 2
  reason = "data holds no position in the data" if name.startswith("data") else "cannot read the weights"
  assert "4 is damaged: " in caplog.text and reason in caplog.text and "step 2 is used instead" in caplog.text
  assert f"python -m univid_jax.verify {workdir}/checkpoints/2 --write" in caplog.text
  assert folders(workdir) == ["2", "4.damaged"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_position_of_another_mesh_is_not_damaged(workdir, monkeypatch, verify):
  """Whether its checkpoint has checksums or not."""

  def set_state(stream, states):
    raise UserError("3 rows do not divide over 2 streams")

  (workdir / "checkpoints" / "4" / CHECKSUMS_FILE).unlink()
  monkeypatch.setattr(Stream, "set_state", set_state)
  with pytest.raises(UserError, match=r"^3 rows do not divide over 2 streams$") as error:
    resume(workdir, verify=verify)
  assert not isinstance(error.value, DamagedError) and folders(workdir) == ["2", "4"]


class TestProcesses:
  """Of several, the others stand in."""

  @pytest.fixture
  def elsewhere(self, monkeypatch):
    """For each checkpoint: for how many other processes it is damaged, and how many cannot read it."""
    counts: list[tuple[int, int]] = []
    numbers = (number for pair in counts for number in pair)
    monkeypatch.setattr(saved, "sum_over_processes", lambda value: value + next(numbers))
    return counts

  @pytest.mark.parametrize("verify", [True, False])
  def test_what_is_damaged_for_another_is_not_used_here(self, workdir, caplog, elsewhere, verify):
    elsewhere += [(1, 1), (0, 0)]
    with caplog.at_level(logging.WARNING):
      assert resume(workdir, verify=verify) == 2
    assert "4 is damaged: another process says where; the checkpoint of step 2 is used instead" in caplog.text
    assert folders(workdir) == ["2", "4.damaged"]

  def test_damage_is_that_of_any_process(self, workdir, elsewhere):
    """Also if this one, which hashes other files, fails for another reason."""
    elsewhere.append((1, 1))

    def read(folder):
      raise UserError("cannot read") from ValueError()

    with pytest.raises(DamagedError, match="4 is damaged: another process says where"):
      SavedCheckpoints(workdir).read(4, read)

  def test_an_error_of_another_ends_all(self, workdir, elsewhere):
    elsewhere.append((0, 1))
    with pytest.raises(UserError, match="4 cannot be read by another process, which says why") as error:
      resume(workdir)
    assert not isinstance(error.value, DamagedError) and folders(workdir) == ["2", "4"]

  def test_all_must_find_the_same_checkpoints(self, workdir, monkeypatch):
    monkeypatch.setattr(saved, "count_distinct", lambda values: 2)
    for step in (None, 4, 5, "best"):
      with pytest.raises(UserError, match=r"the processes find different checkpoints in .*: the workdir must be"):
        SavedCheckpoints(workdir).read(step, lambda folder: None)

  def test_all_start_a_run_or_none(self, tmp_path, monkeypatch):
    """A process that sees no checkpoint while others do must not begin with new weights."""
    monkeypatch.setattr(saved, "count_distinct", lambda values: 2)
    run = mock.Mock(spec=Run)
    run.config = run.spec = None
    with pytest.raises(UserError, match="the processes find different checkpoints"):
      restore_or_create_state(run, Checkpointer(tmp_path), mock.Mock(spec=Loader))


TWO_PROCESSES = """
import contextlib, sys
from pathlib import Path
from univid_jax.runtime.processes import connect, disconnect, wait_for_processes

port, index, workdir = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
connect(f"127.0.0.1:{port}", 2, index, heartbeat_seconds=60)
import jax, jax.numpy as jnp, numpy as np
from tests.test_damaged_runs import open_stream
from univid_jax.checkpoints.run import Checkpointer

sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), "x"), jax.sharding.PartitionSpec("x"))
abstract = {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=sharding)}

def numbers(step):  # that do not compress, or they would be in files that both read
  return np.random.default_rng(step).random((64, 64), np.float32)

def array(step):
  return {"kernel": jax.make_array_from_callback((64, 64), sharding, lambda index: numbers(step)[index])}

with contextlib.closing(Checkpointer(workdir)) as checkpointer:
  for step in (2, 4):
    checkpointer.save(step, model=array(step), training=array(step), data=open_stream(step))
wait_for_processes("saved")
if index == 1:
  (workdir / "checkpoints" / "4" / "checksums.xxh128").unlink()
  for path in (workdir / "checkpoints" / "4" / "model" / "ocdbt.process_1" / "d").iterdir():
    path.write_bytes(bytes(byte ^ 90 for byte in path.read_bytes()))
wait_for_processes("damaged")
with contextlib.closing(Checkpointer(workdir)) as checkpointer:
  for items in checkpointer.restore(model=abstract, training=abstract, data=open_stream()):
    for shard in items["kernel"].addressable_shards:
      np.testing.assert_array_equal(shard.data, numbers(2)[shard.index])
disconnect()
"""


@pytest.mark.long
def test_two_processes_use_the_same(tmp_path):
  """The newest has no checksums, and only one of them reads the file that is damaged."""
  port = free_port()
  both = [start_python("-c", TWO_PROCESSES, f"{port}", f"{index}", f"{tmp_path}", devices=1) for index in (0, 1)]
  for done in map(finish, both):
    assert done.returncode == 0 and "the checkpoint of step 2 is used instead" in done.stderr, done.stderr
  assert folders(tmp_path) == ["2", "4.damaged"]


def test_an_intact_checkpoint_of_something_else_is_not_damaged(workdir):
  abstract = {"kernel": jax.ShapeDtypeStruct((3, 3), np.float32, sharding=jnp.zeros(()).sharding)}
  with (
    contextlib.closing(Checkpointer(workdir)) as checkpointer,
    pytest.raises(UserError, match="cannot read") as error,
  ):
    checkpointer.restore(model=abstract, training={}, data=open_stream())
  assert not isinstance(error.value, DamagedError) and folders(workdir) == ["2", "4"]


def test_sampling(workdir, caplog):
  """It takes the newest intact one, unless another is asked for; it renames nothing."""
  name = damage(workdir)
  with caplog.at_level(logging.WARNING):
    assert find_step(workdir, None) == 2
  assert f"{name} (checksum differs); the checkpoint of step 2 is used instead" in caplog.text
  assert find_step(workdir, None, verify=False) == 4 and find_step(workdir, 4, verify=False) == 4
  for step in ("4", "best"):
    with pytest.raises(DamagedError, match=r"checksum differs.*--verify_weights=off"):
      find_step(workdir, step)
  with pytest.raises(DamagedError, match="checksum differs"):
    find_step(workdir, None, on_damaged=OnDamaged.STOP)
  assert folders(workdir) == ["2", "4"]


def test_large_states_that_are_not_read(workdir, monkeypatch):
  """To sample, the optimizer's state is not hashed if that takes long."""
  damage(workdir, item="training")
  assert find_step(workdir, None) == 2
  monkeypatch.setattr("univid_jax.checkpoints.saved._QUICK_BYTES", 10)
  assert find_step(workdir, None) == 4 and resume(workdir) == 2


class TestAddedLoss:
  """A validation loss that is measured after its step was saved."""

  def save(self, checkpointer, step, val_loss=None):
    model, training = arrays(step), {"step": jnp.asarray(step), "moments": arrays(-step)}
    checkpointer.save(step, model=model, training=training, data=open_stream(step), val_loss=val_loss)

  @pytest.mark.parametrize("reopened", [True, False], ids=["by the next start", "by the same"])
  def test_counts_for_what_is_kept(self, tmp_path, reopened):
    with contextlib.ExitStack() as stack:
      checkpointer = stack.enter_context(contextlib.closing(Checkpointer(tmp_path, keep=1)))
      self.save(checkpointer, 2)
      if reopened:
        checkpointer.close()
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(tmp_path, keep=1)))
      checkpointer.add_val_loss(2, 0.5)
      assert checkpointer.val_loss(2) == 0.5
      for step, val_loss in ((4, 0.9), (6, 0.8)):
        self.save(checkpointer, step, val_loss)
    assert folders(tmp_path) == ["2", "6"] and find_step(tmp_path, "best") == 2
    folder = tmp_path / "checkpoints" / "2"
    assert "metrics/metrics" in checksums.read_names(folder) and not find_damage(folder)

  def test_hides_no_damage(self, tmp_path, caplog):
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
      self.save(checkpointer, 2)
      checkpointer.wait()
      name = damage(tmp_path, 2)
      checkpointer.add_val_loss(2, 0.5)
    assert f"2 is damaged: {name} (checksum differs)" in caplog.text
    with pytest.raises(DamagedError, match="checksum differs"):
      find_step(tmp_path, 2)

  def test_the_best_is_kept_beside_one_that_is_not_finite(self, tmp_path):
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpointer:
      for step, val_loss in ((2, 0.5), (4, 0.3), (6, float("nan")), (8, 0.9)):
        self.save(checkpointer, step, val_loss)
    assert folders(tmp_path) == ["4", "8"] and find_step(tmp_path, "best") == 4

  @pytest.mark.parametrize(
    "losses, best", [({2: 0.3, 4: 0.5, 6: 0.3}, 6), ({2: 0.2, 4: 0.3}, 2), ({2: None, 4: 0.5}, 4), ({2: None}, None)]
  )
  def test_of_equal_ones_the_last_is_the_best(self, monkeypatch, losses, best):
    monkeypatch.setattr(SavedCheckpoints, "steps", list(losses))
    monkeypatch.setattr(SavedCheckpoints, "val_loss", lambda self, step: losses[step])
    assert SavedCheckpoints("workdir").find_best() == best

  def test_that_is_not_finite_is_none(self, workdir):
    with contextlib.closing(Checkpointer(workdir)) as checkpointer:
      checkpointer.add_val_loss(4, float("nan"))
    assert find_step(workdir, "best") == 4 and not find_damage(workdir / "checkpoints" / "4")


def test_damaged_metrics_of_an_older_one(workdir, caplog):
  """Orbax reads those of all checkpoints before it saves another."""
  damage(workdir, 2, "metrics")
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == 4
  assert "2 is damaged: metrics/metrics (checksum differs)" in caplog.text
  save(workdir, [6])
  assert folders(workdir) == ["2.damaged", "4", "6"] and find_step(workdir, "best") == 6
  damage(workdir, 4, "metrics")
  with pytest.raises(DamagedError, match="metrics/metrics"):
    find_step(workdir, "best")


def test_a_kill_while_an_old_one_is_deleted(workdir, caplog, monkeypatch):
  """What is left of it is taken neither for a checkpoint nor for damage, and the next start removes it."""
  unlink, deleted = os.unlink, []

  def unlink_two(path, *, dir_fd=None):
    if dir_fd is not None:  # of a whole folder
      if len(deleted) == 2:
        raise RuntimeError("killed")
      deleted.append(path)
    unlink(path, dir_fd=dir_fd)

  with monkeypatch.context() as patch, pytest.raises((OSError, RuntimeError), match="killed"):
    patch.setattr(os, "unlink", unlink_two)
    save(workdir, [6], keep=1)
  assert len(deleted) == 2
  with caplog.at_level(logging.WARNING):
    assert run_verify(workdir, "--write") == 0  # the new one has no checksums yet
    monkeypatch.chdir(workdir / "checkpoints")
    assert run_verify(".") == 0
    assert resume(workdir, keep=1) == 6
  assert not caplog.records and folders(workdir) == ["6"]


def test_outdated_checkpoints_that_cannot_be_deleted(workdir, caplog, monkeypatch):
  """Training goes on, as it does not need that space yet."""
  unlink = os.unlink

  def refuse(path, *, dir_fd=None):
    if dir_fd is not None:  # of a whole folder
      raise PermissionError(errno.EACCES, "Permission denied", path)
    unlink(path)

  with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
    patch.setattr(os, "unlink", refuse)
    save(workdir, [6], keep=1)
  assert f"cannot delete the outdated checkpoints in {workdir}/checkpoints/deleted: Permission denied" in caplog.text
  # The same step becomes outdated again, as when it is repeated because a newer one is damaged.
  shutil.rmtree(workdir / "checkpoints" / "6")
  with monkeypatch.context() as patch:
    patch.setattr(os, "unlink", refuse)
    save(workdir, [4, 8], keep=1)
  save(workdir, [10], keep=1)
  assert folders(workdir) == ["10"]


def test_adding_checksums(workdir, caplog, capsys):
  """Checkpoints without them load with a warning; the command that it names adds them."""
  for step in (2, 4):
    (workdir / "checkpoints" / str(step) / CHECKSUMS_FILE).unlink()
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == 4
  assert f"python -m univid_jax.verify {workdir}/checkpoints/4 --write" in caplog.text
  assert run_verify(workdir) == 1 and run_verify(workdir, "--write") == 0 and run_verify(workdir) == 0
  name = damage(workdir)
  assert run_verify(workdir, "--write") == 1 and f"checkpoints/4/{name} (checksum differs)" in capsys.readouterr().out


def test_the_origin_of_samples(workdir, tiny_config, monkeypatch):
  """It follows from the content alone. What `load_pipeline` compares with checksums is not read a second time."""
  write_run(workdir, RunRecord(tiny_config, ("",), "test"))
  hashed = []
  monkeypatch.setattr(checksums, "hash_file", lambda path: (hashed.append(path), hash_file(path))[1])

  def identify(step=4, **options):
    hashed.clear()
    return Origin.resolve(str(workdir), step=step, **options).checksums

  listed = identify()
  assert listed.keys() == {"trained"} and not hashed
  assert identify(verify_weights=False) == listed and hashed, "the list is not trusted unless it is verified"
  (workdir / "checkpoints" / "4" / CHECKSUMS_FILE).rename(workdir / "list")
  assert identify() == listed and hashed
  assert identify(step=2) != listed
  (workdir / "list").rename(workdir / "checkpoints" / "4" / CHECKSUMS_FILE)
  damage(workdir)
  changed = identify(verify_weights=False)
  assert changed != listed
  with pytest.raises(DamagedError, match="checksum differs"):
    load_pipeline(str(workdir), step=4)  # before anything is stored under the origin
  checksums.write_checksums(workdir / "checkpoints" / "4")
  assert identify() == changed and not hashed


@pytest.mark.long
def test_a_run(tiny_config, tmp_path, caplog):
  """A run that falls back ends as an undisturbed one, and its metrics hold each step once."""
  config = override(tiny_config, {"checkpoint.every_steps": 2, "validation.every_steps": 0})
  logging.getLogger("absl").addHandler(caplog.handler)
  try:
    train(config, str(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    name = damage(tmp_path / "damaged")
    with caplog.at_level(logging.WARNING):
      assert train(config, str(tmp_path / "damaged")).steps_taken == 2
    assert f"4 is damaged: {name} (checksum differs); the checkpoint of step 2 is used instead" in caplog.text
    both = [parameters(load_pipeline(str(tmp_path / name))) for name in ("run", "damaged")]
  finally:
    logging.getLogger("absl").removeHandler(caplog.handler)
  # Orbax's warnings are for those who write code with it.
  assert not [record for record in caplog.records if record.name == "absl"]
  assert jax.tree.all(jax.tree.map(np.array_equal, *both))
  metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "damaged")]
  steps, losses = ([[json.loads(line)[key] for line in lines] for lines in metrics] for key in ("step", "loss"))
  assert steps[0] == steps[1] == [1, 2, 3, 4] and losses[0] == losses[1]
  assert folders(tmp_path / "damaged") == ["2", "4", "4.damaged"]
  (tmp_path / "run" / "config.json").unlink()
  for use in (lambda: train(config, str(tmp_path / "run")), lambda: load_pipeline(str(tmp_path / "run"))):
    with pytest.raises((UserError, FileNotFoundError), match=r"has checkpoints, but no config\.json.*from a copy"):
      use()
