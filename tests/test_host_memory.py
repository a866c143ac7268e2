"""A frozen base, or what its blocks start from, in the memory of the host: nothing but the place changes."""

import json

import jax
import pytest

from univid_jax.checkpoints.trained import load_base
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.parallel.host_memory import FIRST_VERSION, is_on_host
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning.forecasts import forecast
from univid_jax.training.loop import train

CHANGES = {
  "num_steps": 2,
  "log_every": 1,
  "ema_decay": 0.0,
  "model.dim": 64,
  "model.num_layers": 3,
  "data.height": 16,
  "data.width": 16,
  "rows.num_tokens": 48,
  "rows.packing_bins": 8,
  "lora.rank": 2,
  "validation.every_steps": 0,
  "eval.sentences_per_case": 0,
}
OFFLOAD, REMAT = {"base.offload": True}, {"model.remat": "offload"}

needs_host_memory = pytest.mark.skipif(jax.__version_info__ < FIRST_VERSION, reason="CPU devices of this JAX lack it")


def config_of(changes):
  return override(tiny(), CHANGES | changes)


def losses(workdir, changes):
  train(config_of(changes), str(workdir))
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize(
  "changes, others",
  [
    ({}, [OFFLOAD, REMAT, OFFLOAD | REMAT]),
    ({"base.quantize": "int8"}, [OFFLOAD]),
    ({"base.quantize": "nf4", "mesh.fsdp": 4}, [OFFLOAD | REMAT]),
  ],
  ids=["floats", "int8", "nf4"],
)
def test_losses_are_the_same(tmp_path, changes, others):
  if jax.__version_info__ < FIRST_VERSION:  # the tests have eight devices
    with pytest.raises(UserError, match=r"on several devices needs JAX 0\.10\.2, this is "):
      losses(tmp_path / "refused", changes | others[0])
    return
  expected = losses(tmp_path / "plain", changes)
  for number, other in enumerate(others):
    assert losses(tmp_path / str(number), changes | other) == expected


@needs_host_memory
@pytest.mark.long
def test_a_run_goes_on_with_its_base_elsewhere(tmp_path):
  expected = losses(tmp_path / "whole", {"num_steps": 4})
  losses(tmp_path / "run", OFFLOAD)
  assert losses(tmp_path / "run", {"num_steps": 4}) == expected


@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.long), "int8"])
def test_matrices_of_blocks_are_in_the_memory_of_the_host(method):
  config = config_of(OFFLOAD | {"base.quantize": method})
  _, params = load_base(config, make_mesh({"fsdp": 4}, jax.devices()[:4]))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert is_on_host(leaf) == (path[0].key == "blocks" and leaf.ndim > 2), path


@needs_host_memory
@pytest.mark.long
def test_the_forecast_counts_them_apart():
  mesh = make_mesh({}, jax.devices()[:1])
  whole, parted = (forecast(config_of(changes), mesh) for changes in ({}, OFFLOAD))
  assert parted.host > 0 and parted.weights + parted.host == whole.weights
  assert f"in the host's memory for each device: {parted.host / 1e9:.2f} GB" in str(parted)
  assert "host" not in str(whole)


@pytest.mark.parametrize("changes, key", [(OFFLOAD, "config.base.offload"), (REMAT, "config.model.remat = offload")])
def test_devices_without_access_are_refused(monkeypatch, changes, key):
  monkeypatch.setattr("univid_jax.parallel.host_memory.KIND", "elsewhere")
  with pytest.raises(UserError, match=rf"{key} needs devices that copy from the host's memory"):
    forecast(config_of(changes), make_mesh({}, jax.devices()[:1]))


@pytest.mark.skipif(jax.__version_info__ >= FIRST_VERSION, reason="CPU devices of this JAX can copy")
def test_a_cpu_of_an_old_version_is_refused():
  with pytest.raises(UserError, match=r"config\.model\.remat = offload on a CPU needs JAX 0\.10\.2, this is "):
    forecast(config_of(REMAT), make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lora.rank": 0}, r"config\.base\.offload is for a frozen base: set config\.lora\.rank"),
    ({"model.remat": "none"}, r"config\.base\.offload needs a backward pass that copies blocks again"),
  ],
)
def test_blocks_that_stay_on_the_devices_are_refused(changes, message):
  """Those that are trained, and those that no block's backward pass fetches again."""
  with pytest.raises(UserError, match=message):
    config_of(OFFLOAD | changes)
