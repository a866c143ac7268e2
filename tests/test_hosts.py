"""Rows of a batch on devices that are assigned to processes in any order, as those of TPU slices are."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from tests.commands import SMALL, finish, free_port, run_command, start_python
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.data.rows.loader import Loader
from univid_jax.data.rows.loader_options import RowOwnership
from univid_jax.parallel.mesh import AXES, make_mesh
from univid_jax.parallel.sharding import own_rows, row_owners, rows_by_owner, shard_batch, shard_own_rows
from univid_jax.runtime.processes import gather_arrays
from univid_jax.training import loop


@dataclasses.dataclass(frozen=True)
class HostChip:
  """What JAX needs to know of a TPU to place it in a mesh, and the process that it belongs to."""

  id: int
  coords: tuple[int, int, int]
  process_index: int
  device_kind: str
  slice_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"


def slice_mesh(kind: str, size: tuple[int, int, int], sizes: dict[str, int]) -> Mesh:
  """Returns a mesh over a slice whose hosts have 2 x 2 chips each."""
  x, y, z = size
  hosts = x // 2, y // 2
  chips = [
    HostChip(i + x * (j + y * k), (i, j, k), i // 2 + hosts[0] * (j // 2 + hosts[1] * k), kind)
    for k in range(z)
    for j in range(y)
    for i in range(x)
  ]
  return make_mesh(sizes, chips)


V5E, V5P = ("TPU v5 lite", (4, 4, 1)), ("TPU v5p", (2, 2, 4))
SLICES = [
  (*V5E, {"data": 16}),
  (*V5E, {"fsdp": 16}),
  (*V5E, {"fsdp": 4, "context": 4}),
  (*V5E, {"data": 2, "context": 8}),
  (*V5E, {"fsdp": 8, "tensor": 2}),
  (*V5E, {"context": 16}),
  (*V5P, {"data": 16}),
  (*V5P, {"data": 4, "context": 4}),
]


class NumberedStream:
  """Batches of which each row is (number of the stream, row of the stream's part, step)."""

  def __init__(self, number: int, count: int, num_rows: int):
    self.number, self.num_rows, self.step = number, num_rows, 0

  def __next__(self):
    rows = np.array([(self.number, row, self.step) for row in range(self.num_rows)])
    self.step += 1
    return rows

  def get_state(self):
    return {"step": self.step}

  def set_state(self, state):
    self.step = state["step"]

  def close(self):
    pass


class PlainLoader(Loader):
  """A loader of arrays instead of rows of tokens."""

  @property
  def streams(self):
    return list(self._streams)


@pytest.fixture
def open_loader(monkeypatch):
  monkeypatch.setattr("univid_jax.data.rows.loader.join_rows", np.concatenate)

  def open_loader(mesh: Mesh, process: int, num_rows: int, num_streams: int) -> PlainLoader:
    ownership = RowOwnership.from_mesh(num_rows, mesh, process)
    return PlainLoader(NumberedStream, num_streams=num_streams, ownership=ownership)

  return open_loader


@pytest.mark.parametrize("kind, size, sizes", SLICES, ids=str)
@pytest.mark.parametrize("rows_per_shard", [1, 2])
def test_processes_make_the_rows_of_their_devices(open_loader, kind, size, sizes, rows_per_shard):
  """Processes that share a row make the same; all rows of a batch differ; no other process's rows are read."""
  mesh = slice_mesh(kind, size, sizes)
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  num_rows = shards * rows_per_shard
  devices = mesh.devices.reshape(shards, -1)
  owners = row_owners(num_rows, mesh)
  assert owners == [tuple(sorted({x.process_index for x in devices[row // rows_per_shard]})) for row in range(num_rows)]
  groups = len(set(owners))
  loaders = [open_loader(mesh, process, num_rows, groups) for process in range(4)]
  for _ in range(2):
    batch = {}
    for process, loader in enumerate(loaders):
      for row, value in zip(own_rows(num_rows, mesh, process), next(loader), strict=True):
        np.testing.assert_array_equal(batch.setdefault(row, value), value)
    assert sorted(batch) == list(range(num_rows)) and len({tuple(value) for value in batch.values()}) == num_rows
  if all(len(each) == 1 for each in owners):
    assert [loader.streams for loader in loaders] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("sizes, shared", [({"data": 16}, False), ({"fsdp": 4, "context": 4}, True)], ids=str)
def test_loaders_know_whether_processes_share_rows(monkeypatch, sizes, shared):
  monkeypatch.setattr(loop, "make_loader", lambda *_, **options: options)
  data = SimpleNamespace(sources={}, weights={})
  config = override(tiny(), {"rows.per_batch": 16})
  run = SimpleNamespace(config=config, data=data, features=None, mesh=slice_mesh(*V5E, sizes))
  options = loop.open_loader(run)
  ownership, num_owners = options["ownership"], len(set(row_owners(16, run.mesh)))
  assert ownership.is_shared == shared and ownership.num_owners == options["options"].num_streams == num_owners


def test_a_run_continues_with_its_rows_where_they_were(open_loader):
  """On another mesh of the same batches their order stays that of the run; where it is not saved it is the mesh's."""
  mesh, other = (slice_mesh(*each) for each in ((*V5P, {"data": 16}), (*V5E, {"fsdp": 16})))
  assert rows_by_owner(16, mesh) == [row for first in range(4) for row in range(first, 16, 4)]
  assert rows_by_owner(16, other) != rows_by_owner(16, mesh)

  def batch_of(loaders, mesh):
    rows = [zip(own_rows(16, mesh, process), next(loader)) for process, loader in enumerate(loaders)]
    return [tuple(value) for _, value in sorted((row, tuple(value)) for part in rows for row, value in part)]

  loaders = [open_loader(mesh, process, 16, 4) for process in range(4)]
  batch_of(loaders, mesh)
  states = [loader.get_state() for loader in loaders]
  expected = batch_of(loaders, mesh)
  others = [open_loader(other, process, 16, 4) for process in range(4)]
  for loader in others:
    loader.set_state(states)
  assert batch_of(others, other) == expected
  old = [{name: value for name, value in json.loads(state).items() if name != "row_order"} for state in states]
  for loader in loaders:
    loader.set_state([json.dumps(state).encode() for state in old])
  assert batch_of(loaders, mesh) == expected
  wrong = json.dumps(json.loads(states[0]) | {"row_order": [0] * 16}).encode()
  with pytest.raises(UserError, match="damaged"):
    loaders[0].set_state([wrong, *states[1:]])


class Rows(NamedTuple):
  """Of a batch: `tokens` are sharded over the sequence axis too."""

  tokens: np.ndarray
  labels: np.ndarray

  @classmethod
  def create(cls, count: int) -> "Rows":
    return cls(np.arange(count * 8.0).reshape(count, 8), np.arange(count))


PERMUTED = ({"data": 8}, {"data": 2, "context": 4}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2})


def permuted_mesh(sizes: dict[str, int]) -> Mesh:
  """Returns a mesh whose devices are in an order that neither groups processes nor keeps rows on one."""
  order = np.array(jax.devices())[[0, 4, 1, 5, 6, 7, 2, 3]]
  return Mesh(order.reshape([sizes.get(axis, 1) for axis in AXES]), AXES)


def check_permuted_meshes() -> None:
  for sizes in PERMUTED:
    mesh = permuted_mesh(sizes)
    for per_shard in (1, 2):
      count = per_shard * mesh.shape["data"] * mesh.shape["fsdp"]
      batch, own = Rows.create(count), own_rows(count, mesh)
      for placed in (shard_batch(batch, mesh), shard_own_rows(Rows(*(x[own] for x in batch)), mesh)):
        for expected, x in zip(batch, placed, strict=True):
          assert x.shape == expected.shape, (sizes, x.shape)
          for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
          np.testing.assert_array_equal(gather_arrays(x), expected)


def test_rows_are_where_their_indices_say():
  check_permuted_meshes()
  with pytest.raises(ValueError, match="3 rows do not divide over 8 shards"):
    shard_batch(Rows.create(3), permuted_mesh({"data": 8}))


TWO_PROCESSES = """
import sys
from univid_jax.runtime.processes import connect, disconnect

connect(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), heartbeat_seconds=60)
from tests.test_hosts import check_permuted_meshes
check_permuted_meshes()
disconnect()
"""


def test_rows_of_two_processes_are_where_their_indices_say():
  port = free_port()
  both = [start_python("-c", TWO_PROCESSES, port, index, devices=4) for index in (0, 1)]
  for done in map(finish, both):
    assert done.returncode == 0, done.stderr


# A command whose mesh takes the devices in the order of `permuted_mesh`.
TRAIN_PERMUTED = """
import sys
import numpy as np
from univid_jax.parallel import mesh
from univid_jax.train import main

def place(shape, devices, **_):
  return np.array(devices)[[0, 4, 1, 5, 6, 7, 2, 3]].reshape(shape)

mesh.mesh_utils.create_device_mesh = place
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
  "sizes", [{"data": 4, "context": 2}, pytest.param({"data": 8}, marks=pytest.mark.slow)], ids=str
)
def test_training_on_permuted_devices_equals_one_process(tmp_path, sizes):
  """Two processes, which may share rows, begin a run, and one continues as they do: losses, validation and previews."""
  arguments = [
    *SMALL,
    *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()),
    "--config.eval.sentences_per_case=0",
    "--config.validation.sentences=8",
    "--config.validation.previews=8",
    "--config.validation.num_inference_steps=1",
  ]

  def train_together(folder, steps):
    group = [f"--workdir={folder}", f"--config.num_steps={steps}", f"--coordinator=127.0.0.1:{free_port()}"]
    both = [
      start_python("-c", TRAIN_PERMUTED, *arguments, *group, "--num_processes=2", f"--process_id={index}", devices=4)
      for index in (0, 1)
    ]
    for done in map(finish, both):
      assert done.returncode == 0, done.stderr

  def results(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line[name] for line in lines for name in ("loss", "val_loss") if name in line]
    return losses, np.asarray(Image.open(folder / "previews" / "step_000002.png"), np.int64)

  together, alone = tmp_path / "together", tmp_path / "alone"
  train_together(together, 1)
  shutil.copytree(together, alone)
  train_together(together, 2)
  arguments.append(f"--workdir={alone}")
  done = run_command("univid_jax.train", *arguments, "--config.num_steps=2", devices=8)
  assert done.returncode == 0, done.stderr
  (losses, grid), (other_losses, other_grid) = results(alone), results(together)
  assert len(losses) == 4
  np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
  assert np.abs(grid - other_grid).max() <= 2
