"""The autoencoder and the encoders equal the originals."""

import dataclasses
import functools
import gc
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from flax import nnx

from tests.helpers import GOLDENS22, golden, load, relative_error
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.codecs.tiling import Tiling, decode_tiled, encode_tiled
from univid_jax.codecs.vae_config import AUTOENCODERS, VAEConfig
from univid_jax.codecs.wan_vae import VAE, WanVAECodec
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.models.clip import MEAN, STD, CLIPConfig, CLIPVision, preprocess
from univid_jax.models.umt5 import UMT5Config, UMT5Encoder, relative_buckets
from univid_jax.parallel.mesh import make_mesh


def frames_last(video):
  """Converts (1, c, t, y, x) to (t, y, x, c)."""
  return jnp.asarray(video[0].transpose(1, 2, 3, 0))


def count(init) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(init), nnx.Param)))


@functools.cache
def autoencoder_golden(version):
  """Returns (inputs and outputs, config, weights) of an autoencoder of Wan."""
  if version == "wan2.1":
    _, io, weights = golden("vae")
    return io, VAEConfig(dim=8), weights
  pytest.importorskip("torch", reason="the weights are a PyTorch file; needs the extra `convert`")
  _, io, _ = golden("vae22", GOLDENS22)
  tensors = open_tensors(GOLDENS22 / "tiny_wan22_ti2v" / "Wan2.2_VAE.pth")
  config = dataclasses.replace(AUTOENCODERS["wan2.2"], dim=8, decoder_dim=12)
  return io, config, {name: tensors.read(name) for name in tensors.infos}


@functools.cache
def autoencoder(version, **options):
  _, config, weights = autoencoder_golden(version)
  return load("vae", lambda: VAE(config, rngs=nnx.Rngs(0), **options), weights)


def cases(*default, rest):
  """Parametrises a test: the cases of the default tests, then those of the long ones."""
  return [*default, *(pytest.param(*case, marks=pytest.mark.long) for case in rest)]


class TestVAE:
  @pytest.mark.parametrize(
    "version, frames",
    cases(("wan2.1", 9), ("wan2.2", 9), rest=[("wan2.1", 1), ("wan2.1", 5), ("wan2.2", 1), ("wan2.2", 5)]),
  )
  def test_equals_the_original(self, version, frames):
    model, (io, _, _) = autoencoder(version), autoencoder_golden(version)
    latents = jax.jit(model.encode)(frames_last(io[f"video{frames}"]))
    expected = frames_last(io[f"latent{frames}"])
    assert latents.dtype == jnp.float32 and relative_error(latents, expected) <= 1e-4
    assert relative_error(jax.jit(model.decode)(expected), frames_last(io[f"recon{frames}"])) <= 1e-4

  @pytest.mark.parametrize(
    "tiling", [None, pytest.param(Tiling(size=4, overlap=1), marks=pytest.mark.long)], ids=["whole", "tiled"]
  )
  def test_parts_are_the_clip(self, tiling):
    model = autoencoder("wan2.1")
    graph, params = nnx.split(model)
    codec = WanVAECodec(model.config, graph, params, mesh=make_mesh({}, jax.devices()[:1]), tiling=tiling)
    latents = np.random.default_rng(0).normal(size=(3, 4, 6, codec.latent_channels)).astype(np.float32)
    parts = list(codec.decode_parts(latents))
    assert [len(part) for part in parts] == [1, 4, 4]
    assert relative_error(np.concatenate(parts), codec.decode(latents)) <= 1e-5

  @pytest.mark.parametrize(
    "tiling, frames",
    cases((None, 1), rest=[(None, 5), (Tiling(size=4, overlap=1), 5)]),
    ids=["image", "whole", "tiled"],
  )
  def test_devices_encode_a_clip_each(self, tiling, frames):
    """The numbers are those of one device, however many clips there are."""
    model = autoencoder("wan2.1")
    graph, params = nnx.split(model)
    mesh, devices = make_mesh({}, jax.devices()[:1]), jax.devices()[:4]
    codec = WanVAECodec(model.config, graph, params, mesh=mesh, devices=devices, tiling=tiling)
    assert codec.num_parallel == 4
    clips = list(np.random.default_rng(0).uniform(-1, 1, (4, frames, 32, 48, 3)).astype(np.float32))
    expected = [codec.encode(clip) for clip in clips]
    for count in (4, 3, 1):
      encoded = codec.encode_many(clips[:count])
      assert len(encoded) == count
      for ours, alone in zip(encoded, expected):
        np.testing.assert_array_equal(ours, alone)

  def test_what_devices_hold_goes_with_the_codec(self):
    """At once: what comes next needs the memory."""
    model = autoencoder("wan2.1")
    graph, params = nnx.split(jax.tree.map(jnp.copy, model))
    codec = WanVAECodec(model.config, graph, params, mesh=make_mesh({}, jax.devices()[:1]), devices=jax.devices()[:2])
    codec.encode_many([np.zeros((1, 16, 16, 3), np.float32)] * 2)
    leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    gc.disable()
    try:
      del codec, params
      assert not any(leaf() is not None for leaf in leaves)
    finally:
      gc.enable()

  @pytest.mark.long
  @pytest.mark.parametrize("version", ["wan2.1", "wan2.2"])
  def test_encoding_and_decoding_are_causal(self, version):
    model = autoencoder(version)
    video = np.random.default_rng(0).uniform(-1, 1, (13, 16, 16, 3)).astype(np.float32)
    changed = video.copy()
    changed[5:] = 0
    encode, decode = jax.jit(model.encode), jax.jit(model.decode)
    latents, other = encode(video), encode(changed)
    np.testing.assert_array_equal(latents[:2], other[:2])
    assert relative_error(other[2:], latents[2:]) > 1e-2
    np.testing.assert_array_equal(decode(latents)[:5], decode(jnp.concatenate([latents[:2], other[2:]]))[:5])

  @pytest.mark.long
  @pytest.mark.parametrize("version", AUTOENCODERS)
  def test_bfloat16_is_close_to_float32(self, version):
    video = frames_last(autoencoder_golden(version)[0]["video5"])
    low, expected = (jax.jit(autoencoder(version, dtype=dtype).encode)(video) for dtype in (jnp.bfloat16, jnp.float32))
    assert 1e-6 < relative_error(low, expected) <= 2e-2

  @pytest.mark.parametrize("version, stride", [("wan2.1", 8), ("wan2.2", 16)])
  def test_invalid_shapes(self, version, stride):
    for shape, message in (
      ((4, 32, 32, 3), "4n \\+ 1 frames, got 4; the nearest are 1 and 5"),
      ((5, 36, 32, 3), f"height must be a multiple of {stride}, got 36; the nearest are 32 and {32 + stride}"),
      ((5, 32, 2, 3), f"width must be a multiple of {stride}, got 2; the nearest are {stride}"),
    ):
      with pytest.raises(UserError, match=message):
        autoencoder(version).encode(jnp.zeros(shape))

  @pytest.mark.parametrize(
    "version, mode",
    cases(("wan2.1", "encode"), rest=[("wan2.1", "decode"), ("wan2.2", "encode"), ("wan2.2", "decode")]),
  )
  def test_memory_does_not_grow_with_the_clip(self, version, mode):
    """Beyond one more copy of its pixels."""
    model = autoencoder(version)
    config, (graph, params) = model.config, nnx.split(model)

    def scratch(frames):
      shape = (frames, 64, 64, 3)
      if mode == "decode":
        shape = *latent_shape(shape, temporal_stride=4, spatial_stride=config.spatial_stride), config.latent_channels
      run = jax.jit(lambda params, x: getattr(nnx.merge(graph, params), mode)(x))
      compiled = run.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(65) - scratch(17) < 1.2 * (65 - 17) * 64 * 64 * 3 * 4

  @pytest.mark.long
  @pytest.mark.parametrize("version, bounds", [("wan2.1", (0.05, 0.12)), ("wan2.2", (0.07, 0.08))])
  def test_tiled_results_are_close_to_untiled_ones(self, version, bounds):
    """Tiles of 256 x 256 pixels that overlap by 64, on a photograph of 320 x 448; see docs/architecture.md.

    They are 0.043 and 0.103 for Wan2.1, 0.062 and 0.072 for Wan2.2, since attention at the lowest resolution sees a
    tile instead of the frame.
    """
    model = autoencoder(version)
    stride = model.config.spatial_stride
    frame = skimage.data.astronaut()[:320, :448].astype(np.float32) / 127.5 - 1
    video = frame[None]
    tiling = Tiling(size=256 // stride, overlap=64 // stride)
    strides = dict(spatial_stride=stride, temporal_stride=4)
    encode, decode = jax.jit(model.encode), jax.jit(model.decode)
    latents = np.asarray(encode(video))
    tiled = encode_tiled(encode, video, tiling, **strides)
    decoded = decode_tiled(decode, latents, tiling, spatial_stride=stride)
    errors = relative_error(tiled, latents), relative_error(decoded, decode(latents))
    print("tiling changes latents and pixels by", errors)
    assert all(0 < error <= bound for error, bound in zip(errors, bounds))
    one_tile = Tiling(size=64, overlap=8)
    assert np.array_equal(encode_tiled(encode, video, one_tile, **strides), latents)


class TestTiling:
  @pytest.mark.parametrize("length, scale", [(60, 1), (104, 8), (33, 1), (32, 8), (5, 1)])
  def test_weights_of_tiles_sum_to_one(self, length, scale):
    total = np.zeros(length * scale)
    places = Tiling(size=32, overlap=8).places(length, scale)
    for start, size, weights in places:
      assert weights.min() > 0 and len(weights) == size * scale
      total[start * scale : (start + size) * scale] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert places[0][0] == 0 and places[-1][0] + places[-1][1] == length

  def test_overlap_of_tiles_is_required(self):
    with pytest.raises(ValueError, match="overlap of tiles"):
      Tiling(size=32, overlap=0)


@pytest.mark.parametrize("version, parameters", [("wan2.1", 126_892_531), ("wan2.2", 704_688_668)])
def test_number_of_parameters_of_autoencoders(version, parameters):
  assert count(lambda: VAE(AUTOENCODERS[version], rngs=nnx.Rngs(0))) == parameters


def test_statistics_of_latents_are_one_number_per_channel():
  with pytest.raises(UserError, match="latent_mean of the autoencoder must be 48 numbers from -1e\\+06"):
    VAEConfig(latent_channels=48)
  with pytest.raises(UserError, match="latent_std of the autoencoder must be 16 numbers from 1e-06"):
    VAEConfig(latent_std=(0.0,) * 16)


class TestUMT5:
  info, io, weights = golden("umt5")
  config = UMT5Config(vocab_size=128, dim=48, attention_dim=48, ffn_dim=96, num_heads=4, num_layers=2)

  def test_equals_the_original(self):
    model = load("text_encoder", lambda: UMT5Encoder(self.config, rngs=nnx.Rngs(0)), self.weights)
    mask = self.io["mask"].astype(bool)
    out = model(jnp.asarray(self.io["ids"]), jnp.asarray(mask))
    assert relative_error(np.asarray(out)[mask], self.io["out"][mask]) <= 2e-5

  def test_bfloat16_is_close_to_float32(self):
    mask = self.io["mask"].astype(bool)
    low = load("text_encoder", lambda: UMT5Encoder(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), self.weights)
    assert (
      1e-6
      < relative_error(
        np.asarray(low(jnp.asarray(self.io["ids"]), jnp.asarray(mask)), np.float32)[mask], self.io["out"][mask]
      )
      <= 2e-2
    )

  def test_buckets(self):
    buckets = relative_buckets(300, 32)
    assert buckets.min() == 0 and buckets.max() == 31
    assert buckets[10, 10] == 0 and buckets[10, 9] == 1 and buckets[10, 11] == 17 and buckets[299, 0] == 15

  def test_number_of_parameters(self):
    assert count(lambda: UMT5Encoder(UMT5Config(), rngs=nnx.Rngs(0))) == 5_680_910_336


class TestCLIP:
  info, io, weights = golden("clip_vision")
  config = CLIPConfig(image_size=28, dim=48, num_heads=4, num_layers=3)

  def used(self):
    """Returns the weights without the last block and the layers after it, which are not part of the model."""
    return {k: v for k, v in self.weights.items() if not k.startswith(("transformer.2.", "post_norm.")) and k != "head"}

  def test_equals_the_original(self):
    model = load("image_encoder", lambda: CLIPVision(self.config, rngs=nnx.Rngs(0)), self.used())
    out = model(jnp.asarray(self.io["image"].transpose(0, 2, 3, 1)))
    assert relative_error(out, self.io["out"]) <= 2e-5

  def test_bfloat16_is_close_to_float32(self):
    model = load("image_encoder", lambda: CLIPVision(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), self.used())
    out = model(jnp.asarray(self.io["image"].transpose(0, 2, 3, 1)))
    assert 1e-6 < relative_error(out, self.io["out"]) <= 2e-2


@pytest.mark.parametrize("shape", [(480, 832), (100, 60), (224, 224)])
def test_image_preprocessing_equals_the_original(shape):
  """PyTorch's bicubic interpolation without antialiasing, then normalisation."""
  torch = pytest.importorskip("torch", reason="needs the extra `parity`")
  frame = np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)
  resized = torch.nn.functional.interpolate(
    torch.from_numpy(frame).permute(2, 0, 1)[None], size=(224, 224), mode="bicubic", align_corners=False
  )
  expected = (resized[0].permute(1, 2, 0).numpy() * 0.5 + 0.5 - np.array(MEAN)) / np.array(STD)
  assert relative_error(preprocess(frame, 224), expected) <= 1e-5


class TestStrictLoading:
  info, io, weights = golden("umt5")

  def load(self, weights):
    return load("text_encoder", lambda: UMT5Encoder(TestUMT5.config, rngs=nnx.Rngs(0)), weights)

  def test_missing_unused_and_misshapen_tensors(self):
    with pytest.raises(ValueError, match=r"missing: norm\.weight \(similar: norme\.weight\); not used: norme\.weight"):
      self.load({("norme.weight" if k == "norm.weight" else k): v for k, v in self.weights.items()})
    with pytest.raises(ValueError, match=r"not used: extra"):
      self.load(self.weights | {"extra": np.zeros(3)})
    message = r"wrong shape: blocks\.1\.attn\.q\.weight is \(47, 48\) instead of \(48, 48\)"
    with pytest.raises(ValueError, match=message):
      self.load(self.weights | {"blocks.1.attn.q.weight": np.zeros((47, 48))})


def test_everything_that_determines_latents_is_part_of_their_fingerprint():
  def fingerprint(*, checksum="a", tiling=None, **config):
    vae = dataclasses.replace(AUTOENCODERS["wan2.1"], **config)
    checkpoint = mock.Mock(spec=PretrainedCheckpoint, checksum=lambda component: checksum, config=lambda component: vae)
    return PretrainedEncoders(checkpoint, make_mesh({}, jax.devices()[:1]), tiling=tiling).codec_fingerprint

  found = [
    fingerprint(),
    fingerprint(checksum="b"),
    fingerprint(latent_mean=(0.5,) * 16),
    fingerprint(latent_std=(0.5,) * 16),
    fingerprint(tiling=Tiling(size=32, overlap=8)),
    fingerprint(tiling=Tiling(size=32, overlap=4)),
    fingerprint(tiling=Tiling(size=16, overlap=8)),
  ]
  assert len(set(found)) == len(found) and fingerprint() == found[0]
