"""Forecasts of memory: training, sampling, the autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.commands import run_command
from univid_jax import forecast as command
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.pretrained import abstract_component
from univid_jax.checkpoints.run_parts import create_model, open_encoders, transformer_config
from univid_jax.codecs.vae_config import VAEConfig
from univid_jax.config.boundary import override
from univid_jax.config.presets import wan22_a14b, wan_1_3b
from univid_jax.core.errors import UserError
from univid_jax.inference.experts import Transformer
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.umt5 import UMT5Config
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import bytes_per_device
from univid_jax.planning.forecasts import forecast, forecast_autoencoder, forecast_sampling, forecast_text_encoder
from univid_jax.training.state import describe_training


class TestForecast:
  def test_arrays_with_more_elements_than_int32(self):
    """The stacked feed-forward kernel of the 14B."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    kernel = jax.ShapeDtypeStruct((40, 5120, 13824), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    assert bytes_per_device({"kernel": kernel}) == 5_662_310_400

  def test_sampling_counts_the_cache(self, tiny_config):
    """Keys and values of a sentence of context I, in every layer."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    assert forecast_sampling(tiny_config, mesh).cache == 0
    found = forecast_sampling(override(tiny_config, {"model.attention": "context_causal"}), mesh)
    tokens = 4 * 2 * (16 // 8) ** 2
    assert found.cache == 2 * 2 * tokens * 32 * 4 and "cache 0.00" in str(found)
    assert found.activations > 0 and found.optimizer == 0 and found.weights > 0

  def test_sampling_packs_as_sampling_does(self, tiny_config):
    """A row is rounded up, here from 72 to 80 tokens, and its intervals hide the padding."""
    config = override(tiny_config, {"data.height": 24, "data.width": 24, "rows.num_tokens": 72})
    mesh = make_mesh({}, jax.devices()[:1])
    graph, params = nnx.split(create_model(config), nnx.Param)
    pipe = Pipeline(
      transformer_config(config),
      [Transformer(graph, nnx.to_pure_dict(params))],
      encoders=open_encoders(config, mesh),
      mesh=mesh,
    )
    frames = np.zeros((config.data.num_frames, 24, 24, 3), np.uint8)
    rows = pipe.pack_job(pipe.make_job([frames] * 3, None, 0), [pipe.embed("")])
    assert rows[0].tokens.shape[1] == 80
    assert forecast_sampling(config, mesh).batch == sum(x.nbytes for x in jax.tree.leaves(rows))

  def test_sampling_says_what_is_sharded(self, tiny_config):
    """One row is sharded over its tokens only if no other axis takes rows, as by the sampler."""
    devices = jax.devices()[:2]
    assert "sharded over fsdp 2; the sentence is whole" in str(
      forecast_sampling(tiny_config, make_mesh({"fsdp": 2}, devices))
    )
    tokens = forecast_sampling(tiny_config, make_mesh({"context": 2}, devices))
    assert "sharded over context 2; the tokens are sharded over context" in str(tokens)
    alone = forecast_sampling(tiny_config, make_mesh({}, devices[:1]))
    assert tokens.batch < 0.8 * alone.batch and "sharded" not in str(alone)

  def test_tokens_must_divide_over_the_devices_that_share_a_row(self, tiny_config):
    with pytest.raises(UserError, match=r"rows of 47 tokens do not divide over config\.mesh\.context = 2"):
      forecast(override(tiny_config, {"rows.num_tokens": 47}), make_mesh({"context": 2}, jax.devices()[:2]))

  @pytest.mark.parametrize("decoding", [pytest.param(False, marks=pytest.mark.long), True])
  def test_autoencoder(self, decoding, monkeypatch):
    """Of a small shape: no weights are needed, and a tile at a time is on the device."""
    shape = VAEConfig(dim=4, dim_mult=(1, 2), temporal_downsample=(True,), num_res_blocks=1)
    monkeypatch.setattr("univid_jax.planning.forecasts.codec_shape", lambda _: shape)
    config = override(wan_1_3b(), {"data.height": 64, "data.width": 96, "data.num_frames": 5})
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    whole = forecast_autoencoder(config, mesh, decoding=decoding)
    module = abstract_component("vae", shape)
    assert whole.weights == 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert whole.batch == 4 * (5 * 64 * 96 * 3 + 3 * 32 * 48 * 16) and "frames of 96 x 64 pixels" in str(whole)
    tiled = override(config, {"vae_tiling.size": 16, "vae_tiling.overlap": 1})
    tile = forecast_autoencoder(tiled, mesh, decoding=decoding)
    assert tile.activations < 0.5 * whole.activations and "tiles of 32 x 32 pixels" in str(tile)

  def test_text_encoder(self, tiny_config, monkeypatch):
    """Of a small shape; each device has its shard of the weights, in bfloat16."""
    shape = UMT5Config(vocab_size=64, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2)
    monkeypatch.setattr("univid_jax.checkpoints.run_parts.UMT5Config", lambda: shape)
    alone = forecast_text_encoder(wan_1_3b(), make_mesh({}, jax.devices()[:1]))
    module = abstract_component("text_encoder", shape)
    assert alone.weights == 2 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert "the text encoder alone; on one device" in str(alone)
    sharded = forecast_text_encoder(wan_1_3b(), make_mesh({"fsdp": 2}, jax.devices()[:2]))
    assert 0.5 <= sharded.weights / alone.weights < 0.6 and "weights are sharded over fsdp 2" in str(sharded)
    with pytest.raises(UserError, match="from scratch has no text encoder"):
      forecast_text_encoder(tiny_config, make_mesh({}, jax.devices()[:1]))

  def test_text_encoder_of_a_base(self, tiny_config, tmp_path):
    """Its own, also if config.model.variant, which the base says too, is empty."""
    shape = UMT5Config(vocab_size=64, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2)
    info, mesh = read_info("small"), make_mesh({}, jax.devices()[:1])
    transformer = info.components["transformer"]
    parts = {
      "transformer": transformer,
      "text_encoder": dataclasses.replace(transformer, config=dataclasses.asdict(shape)),
    }
    dataclasses.replace(info, components=parts, codec=None).write(tmp_path)
    found = forecast_text_encoder(override(tiny_config, {"init_from": str(tmp_path)}), mesh)
    module = abstract_component("text_encoder", shape)
    assert found.weights == 2 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    with pytest.raises(UserError, match="small was trained from scratch without a text encoder"):
      forecast_text_encoder(override(tiny_config, {"init_from": "small"}), mesh)

  def test_a_codec_without_weights_needs_no_device(self, tiny_config):
    with pytest.raises(UserError, match="no weights and runs on no device"):
      forecast_autoencoder(tiny_config, make_mesh({}, jax.devices()[:1]), decoding=True)

  def test_both_experts_are_on_the_devices(self):
    """Of a run of both experts the base weights of both are; a step computes one."""
    config = override(wan22_a14b(), {"model.param_dtype": "bfloat16"})
    mesh = make_mesh({}, devices=jax.devices()[:1])
    both, high = (
      bytes_per_device(describe_training(part, mesh)[1].abstract_frozen)
      for part in (config, override(config, {"model.expert": "high"}))
    )
    assert both == 2 * high > 56e9

  @pytest.mark.parametrize(
    "arguments, code, message",
    [
      ("--config=wan_1_3b --config.rows.num_tokens=20000", 1, "has 31200 tokens, config.rows.num_tokens is only 20000"),
      ("--config=wan_1_3b --config.data.height=470", 1, "clips of 832 x 470 pixels"),
      ("--config=tiny --config.base.offload=True", 2, "config.base.offload is for a frozen base"),
      ("--config=tiny --config.base.quantize=int8", 1, "a base in int8 cannot be trained"),
      ("--config=wan22_a14b --config.model.expert=both --config.lora.rank=0", 2, "is both, which trains LoRAs"),
    ],
  )
  def test_what_training_refuses_is_not_forecast(self, arguments, code, message, capfd):
    assert command.main(["forecast", *arguments.split()]) == code
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1

  def test_sampling_flag_is_deprecated(self, capfd):
    assert command.main(["forecast", "--config=tiny", "--sampling", "--config.model.num_layers=1"]) == 0
    out, err = capfd.readouterr()
    assert "memory per device (cpu)" in out and "use --of=sampling" in err

  @pytest.mark.long
  def test_parts(self, tiny_config):
    """Weights and moments follow from their shapes; sharding divides them."""
    tiny_config = override(tiny_config, {"optimizer.name": "adamw"})
    one, eight = (
      forecast(tiny_config, make_mesh(sizes, devices=jax.devices()[:count]))
      for sizes, count in (({}, 1), ({"fsdp": 8}, 8))
    )
    model = nnx.eval_shape(lambda: create_model(tiny_config))
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert one.weights == 2 * size  # with their moving average
    assert 2 * size <= one.optimizer <= 2 * size + 64 and one.activations > 0
    assert eight.weights < 0.4 * one.weights and eight.optimizer < 0.4 * one.optimizer
    assert "memory per device (cpu)" in str(one) and one.fits

  @pytest.mark.slow
  @pytest.mark.parametrize("preset, topology, sizes", [("wan_1_3b", "v5e:2x4", {"data": 1, "fsdp": 8})])
  def test_tpu_topologies(self, preset, topology, sizes):
    pytest.importorskip("libtpu")
    done = run_command(
      "univid_jax.forecast",
      f"--config=configs/video_tasks.py:{preset}",
      f"--topology={topology}",
      *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()),
    )
    assert done.returncode == 0 and "memory per device (TPU v5 lite)" in done.stdout, done.stderr
