"""Undocumented details of Orbax that checkpoints/orbax_files.py relies on.

If a test fails after an upgrade of Orbax or TensorStore, checkpoints may have become unreadable or conversions corrupt:
adapt that module before raising the upper bound in setup.cfg. If Orbax can write arrays in parts by then, use that.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from univid_jax.checkpoints import orbax_files
from univid_jax.checkpoints.orbax_files import (
  METRICS_FILE,
  create_arrays,
  num_chunks,
  open_arrays,
  read_positions,
  restore_arrays,
  restore_items,
)
from univid_jax.core.errors import UserError

SPECS = {
  ("blocks", "q", "kernel"): ((3, 4, 5), "float32"),
  ("head", "bias"): ((6,), "bfloat16"),
  ("layers", "0", "kernel"): ((8, 4), "float16"),
}


def values():
  rng = np.random.default_rng(0)
  dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
  return {path: rng.normal(size=shape).astype(dtypes[dtype]) for path, (shape, dtype) in SPECS.items()}


def create_and_fill(folder):
  """Writes stacked layers one by one, and one of them with zeros."""
  expected = values()
  expected["blocks", "q", "kernel"][1] = 0
  for path, array in create_arrays(folder, SPECS).items():
    for index in range(len(expected[path])) if path[0] == "blocks" else [...]:
      array[index].write(expected[path][index]).result()
  return expected


def assert_equal(restored, expected):
  flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
  assert flat.keys() == expected.keys()
  for path, value in flat.items():
    assert value.dtype == expected[path].dtype and np.array_equal(value, expected[path]), path


def test_arrays_written_in_parts(tmp_path):
  """Orbax restores what TensorStore wrote into a checkpoint that it saved itself."""
  expected = create_and_fill(tmp_path / "params")
  assert_equal(restore_arrays(tmp_path / "params"), expected)


def test_sharded_restore(tmp_path):
  expected = create_and_fill(tmp_path / "params")
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
  abstract = {"blocks": {"q": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32, sharding=sharding)}}}
  abstract |= {"head": {"bias": jax.ShapeDtypeStruct((6,), np.float32)}}  # cast from bfloat16
  abstract |= {"layers": {"0": {"kernel": jax.ShapeDtypeStruct((8, 4), np.float16)}}}
  restored = restore_arrays(tmp_path / "params", abstract)
  kernel = restored["blocks"]["q"]["kernel"]
  assert kernel.sharding == sharding and np.array_equal(kernel, expected["blocks", "q", "kernel"])
  assert np.array_equal(restored["head"]["bias"], expected["head", "bias"].astype(np.float32))


def test_files(tmp_path, monkeypatch):
  """Each array is a folder named by its dotted path, with one file per chunk, zeros included."""
  monkeypatch.setattr(
    orbax_files, "CHUNK_BYTES", 24
  )  # splits layers of 4 x 5 float32 by rows, and 8 x 4 float16 by threes
  create_and_fill(tmp_path / "params")
  chunks = {
    folder.name: sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    for folder in (tmp_path / "params").iterdir()
    if folder.is_dir() and (folder / ".zarray").exists()
  }
  assert chunks == {
    "blocks.q.kernel": [f"{layer}.{row}.0" for layer in range(3) for row in range(4)],
    "head.bias": ["0"],
    "layers.0.kernel": ["0.0", "1.0", "2.0"],
  }


def test_missing_file(tmp_path):
  """A lost chunk is an error, not zeros."""
  for array in create_arrays(tmp_path / "params", {("x",): ((6,), "float32")}).values():
    array.write(np.ones(6, np.float32)).result()
  (tmp_path / "params" / "x" / "0").unlink()
  with pytest.raises(UserError, match=r"cannot read the weights in .*params"):
    restore_arrays(tmp_path / "params")


def test_layers_read_one_by_one(tmp_path):
  """TensorStore reads single layers of a checkpoint, and says what it cannot read."""
  expected = create_and_fill(tmp_path / "params")
  for path, array in open_arrays(tmp_path / "params", SPECS).items():
    assert array.shape == SPECS[path][0] and array.dtype.name == SPECS[path][1]
    for index in range(len(expected[path])) if path[0] == "blocks" else [...]:
      assert np.array_equal(array[index].read().result(), expected[path][index])
  with pytest.raises(UserError, match=r"cannot read the weights in .*params"):
    open_arrays(tmp_path / "params", [("missing",)])


def test_items_read_one_by_one(tmp_path):
  items = {name: {"x": np.arange(6, dtype=dtype)} for name, dtype in (("a", np.float32), ("b", np.int32))}
  with ocp.CheckpointManager(tmp_path, item_names=("a", "b")) as manager:
    manager.save(3, args=ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()}))
  restored = restore_items(tmp_path / "3", {"b": {"x": jax.ShapeDtypeStruct((6,), np.int32)}})
  assert restored.keys() == {"b"} and np.array_equal(restored["b"]["x"], items["b"]["x"])


def test_metrics_and_positions(tmp_path):
  data = iter(grain.MapDataset.range(5).to_iter_dataset())
  assert next(data) == 0
  options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["val_loss"])
  with ocp.CheckpointManager(tmp_path, options=options, item_names=("data",)) as manager:
    args = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(data))
    manager.save(3, args=args, metrics={"val_loss": 0.5})
  assert json.loads((tmp_path / "3" / METRICS_FILE).read_bytes()) == {"val_loss": 0.5}
  (position,) = read_positions(epath.Path(tmp_path / "3" / "data"))
  assert json.loads(position) == data.get_state()


def test_number_of_files(tmp_path, monkeypatch):
  monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 24)
  create_and_fill(tmp_path / "params")
  for path, (shape, dtype) in SPECS.items():
    files = [file for file in (tmp_path / "params" / ".".join(path)).iterdir() if not file.name.startswith(".")]
    assert num_chunks(path, shape, dtype) == len(files)


def test_what_orbax_abandons_is_not_reported(monkeypatch, caplog):
  """Nor what it logs; everything else is."""
  unraisable: list[SimpleNamespace] = []
  monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
  orbax_files.silence_orbax()
  scope: dict = {}
  for name, file in (("theirs", f"{Path(ocp.__file__).parent}/serialization.py"), ("ours", __file__)):
    exec(compile(f"async def {name}(): pass", file, "exec"), scope)
    coroutine = scope[name]()
    sys.unraisablehook(SimpleNamespace(object=coroutine, exc_value=ValueError()))
    coroutine.close()
  for text in ("Event loop is closed", "something else"):
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError(text)))
  assert [args.object and args.object.__name__ for args in unraisable] == ["ours", None]
  assert str(unraisable[1].exc_value) == "something else"

  for name in ("absl", "asyncio"):
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)
    for path in (f"{Path(ocp.__file__).parent}/checkpoint_manager.py", __file__):
      logger.handle(logging.LogRecord(name, logging.ERROR, path, 1, path, None, None))
    error = ValueError('OUT_OF_RANGE: Error writing "a/0" in OCDBT database')
    logger.error("Future exception was never retrieved", exc_info=(ValueError, error, None))
    logger.removeHandler(caplog.handler)
  assert {record.message for record in caplog.records} == {__file__}


def test_the_hook_works_while_the_interpreter_exits(monkeypatch):
  """Then Python has set the globals of modules to None."""
  unraisable: list[SimpleNamespace] = []
  with monkeypatch.context() as patch:
    patch.setattr(sys, "unraisablehook", unraisable.append)
    orbax_files.silence_orbax()
    for name in vars(orbax_files):
      if not name.startswith("__"):
        patch.setattr(orbax_files, name, None)
    sys.unraisablehook(args := SimpleNamespace(object=None, exc_value=ValueError()))
  assert unraisable == [args]
