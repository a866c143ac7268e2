"""Equality with diffusers and transformers on random configurations, new in every run. Needs the extra `parity`."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import load, load_dit, package_or_skip, relative_error
from tests.test_dit import PATCH, row_of
from univid_jax.codecs.vae_config import AUTOENCODERS
from univid_jax.codecs.wan_vae import VAE
from univid_jax.convert.release_configs import diffusers_config
from univid_jax.core.options import ModelType
from univid_jax.data.rows.packing import target_indices
from univid_jax.data.rows.tokens import patchify, unpatchify
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import SOLVERS
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache
from univid_jax.inference.experts import Experts, Transformer
from univid_jax.inference.plan import SamplingOptions, SamplingPlan
from univid_jax.inference.sampler import PackedJobs, Sampler
from univid_jax.models.dit import DiT
from univid_jax.models.names import diffusers_table, name_from_diffusers
from univid_jax.models.umt5 import UMT5Config, UMT5Encoder
from univid_jax.models.variants import VARIANTS, DiTConfig
from univid_jax.parallel.mesh import make_mesh

torch = package_or_skip("torch", reason="needs the extra `parity`")
diffusers = package_or_skip("diffusers", reason="needs the extra `parity`")
transformers = package_or_skip("transformers", reason="needs the extra `parity`")


@pytest.fixture
def rng():
  seed = int.from_bytes(os.urandom(4), "little")
  print(f"seed {seed}")  # shown by pytest when the test fails
  torch.manual_seed(seed)
  return np.random.default_rng(seed)


# What all of Wan's transformers share in diffusers.
WAN_OPTIONS = {"patch_size": PATCH, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}


def randomize(module):
  """Randomises all parameters: the zeros and ones of a fresh module would hide mistakes."""
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  return module.eval()


def official_weights(component, module):
  state = module.state_dict()
  state.pop("encoder.embed_tokens.weight", None)  # another name of shared.weight
  table = diffusers_table(component, state)
  return {name_from_diffusers(table, name): value.numpy() for name, value in state.items()}


def autoencoder_options(config):
  """Returns the arguments of AutoencoderKLWan for an autoencoder."""
  return {key: value for key, value in diffusers_config(config).items() if key != "_class_name"}


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "i2v of Wan2.2"])
def test_transformer(rng, kind):
  heads, head_dim = int(rng.integers(1, 5)), 2 * int(rng.integers(6, 17))
  layers, text_dim = int(rng.integers(1, 4)), int(rng.integers(8, 40))
  ffn, freq = int(rng.integers(20, 90)), 2 * int(rng.integers(8, 33))
  image = dict(image_dim=40, added_kv_proj_dim=heads * head_dim) if kind == "i2v" else {}
  out_dim = 48 if kind == "ti2v" else 16
  in_dim = 36 if "i2v" in kind and kind != "ti2v" else out_dim
  theirs = randomize(
    diffusers.WanTransformer3DModel(
      num_attention_heads=heads,
      attention_head_dim=head_dim,
      in_channels=in_dim,
      out_channels=out_dim,
      text_dim=text_dim,
      freq_dim=freq,
      ffn_dim=ffn,
      num_layers=layers,
      **WAN_OPTIONS,
      **image,
    )
  )
  config = DiTConfig(
    dim=heads * head_dim,
    ffn_dim=ffn,
    num_heads=heads,
    num_layers=layers,
    freq_dim=freq,
    text_dim=text_dim,
    model_type=ModelType(kind.split()[0]),
    in_dim=in_dim,
    out_dim=out_dim,
    image_dim=40 if image else 0,
  )
  ours = load_dit(config, official_weights("transformer", theirs))

  shape = (int(rng.integers(1, 5)), 2 * int(rng.integers(1, 5)), 2 * int(rng.integers(1, 5)))
  x = rng.normal(size=(out_dim, *shape)).astype(np.float32)
  context = rng.normal(size=(int(rng.integers(0, 30)), text_dim)).astype(np.float32)
  # TI2V's may differ between latent frames.
  t = rng.uniform(0, 1000, shape[0] if kind == "ti2v" else 1).astype(np.float32)
  frames = np.repeat(np.arange(shape[0]), shape[1] * shape[2] // 4)
  padded = np.pad(context, [(0, 512 - len(context)), (0, 0)])
  hidden, given, conditions = x, {}, {}
  if config.takes_condition:
    y = rng.normal(size=(20, *shape)).astype(np.float32)
    hidden, conditions = np.concatenate([x, y]), {"condition": patchify(np.moveaxis(y, 0, -1), PATCH)[None]}
  if config.takes_image_features:
    features = rng.normal(size=(1, 257, 40)).astype(np.float32)
    given, conditions["image_features"] = {"encoder_hidden_states_image": torch.from_numpy(features)}, features
  if kind == "ti2v":
    conditions["modulation_ids"] = frames[None]
  with torch.no_grad():
    their_t = t[frames][None] if kind == "ti2v" else t
    inputs = [torch.from_numpy(array) for array in (hidden[None], their_t, padded[None])]
    expected = theirs(*inputs, return_dict=False, **given)[0]
  row = row_of(x, context)
  out = unpatchify(
    np.asarray(jax.jit(ours)(row.tokens, t[None], dataclasses.replace(row, **conditions)))[0], shape, PATCH
  )
  assert relative_error(out, np.moveaxis(expected[0].numpy(), 0, -1)) <= 2e-5


def sample_with_diffusers(model, noise, contexts, guidance_scale, plan, settings):
  """Samples with MagCache.

  Args:
    model: of diffusers.
    noise: (C, t, y, x).
    contexts: the embedding of the prompt and, with guidance, of the negative one.
    guidance_scale: for two contexts.
    plan: of our sampler.
    settings: of `MagCacheConfig`.

  Returns:
    The latents, and for each branch the number of blocks that were run in each step.
  """
  model.enable_cache(diffusers.MagCacheConfig(num_inference_steps=len(plan.sigmas), **settings))
  calls = []
  counter = model.blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
  padded = [torch.from_numpy(np.pad(context, [(0, 512 - len(context)), (0, 0)])[None]) for context in contexts]
  x, computed = torch.from_numpy(noise)[None], []
  with torch.no_grad():
    for sigma, following in zip(plan.sigmas.tolist(), [*plan.sigmas[1:].tolist(), 0.0]):
      velocities = []
      for name, text in zip(("cond", "uncond"), padded):
        calls.clear()
        with model.cache_context(name):
          velocities.append(model(x, torch.tensor([1000 * sigma]), text, return_dict=False)[0])
        computed.append(len(calls))
      v, *unguided = velocities
      if unguided:
        v = unguided[0] + guidance_scale * (v - unguided[0])
      x = x + (following - sigma) * v
  counter.remove()
  model.disable_cache()
  return np.moveaxis(x[0].numpy(), 0, -1), np.reshape(computed, (len(plan.sigmas), -1)).T


@pytest.mark.long
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_step_cache(rng, guidance_scale, capsys):
  """MagCache: the ratios that both measure, the steps that both skip, and what they sample.

  The model has at least two blocks: with one, diffusers 0.42 does not count the steps that it skips.
  """
  heads, head_dim, layers, text_dim = 2, 2 * int(rng.integers(6, 12)), int(rng.integers(2, 4)), int(rng.integers(8, 40))
  shape = {"ffn_dim": int(rng.integers(20, 90)), "freq_dim": 2 * int(rng.integers(8, 33)), "text_dim": text_dim}
  theirs = randomize(
    diffusers.WanTransformer3DModel(
      num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **shape, **WAN_OPTIONS
    )
  )
  with torch.no_grad():
    theirs.patch_embedding.weight.mul_(8)  # or else the residual hardly depends on the noise
  config = DiTConfig(dim=heads * head_dim, num_heads=heads, num_layers=layers, **shape)
  graph, params = nnx.split(load_dit(config, official_weights("transformer", theirs)), nnx.Param)
  experts = Experts([Transformer(graph, nnx.to_pure_dict(params))], boundary=0.0)
  noise = rng.normal(size=(16, 3, 4, 6)).astype(np.float32)
  contexts = [rng.normal(size=(int(rng.integers(1, 30)), text_dim)).astype(np.float32) for _ in range(2)]
  rows = [jax.tree.map(np.asarray, row_of(noise, context)) for context in contexts]
  rows = [dataclasses.replace(row, targets=target_indices(row.target_mask)) for row in rows]
  guided = guidance_scale != 1
  sampler = Sampler(make_mesh({}, devices=jax.devices()[:1]))

  def sample(step_cache):
    options = SamplingOptions(num_inference_steps=12, guidance_scale=guidance_scale, step_cache=step_cache)
    plan = SamplingPlan.from_options(options)
    packed = PackedJobs(rows[0], rows[1] if guided else None, [(0, 1)], [rows[0].tokens[0]])
    return plan, unpatchify(sampler.sample(experts, packed, plan)[0], noise.shape[1:], PATCH)

  sample_theirs = functools.partial(sample_with_diffusers, theirs, noise, contexts[: 1 + guided], guidance_scale)
  measurement = RatioMeasurement()
  plan, dense = sample(measurement)
  expected, computed = sample_theirs(plan, {"calibrate": True})
  assert computed.all() and relative_error(dense, expected) <= 1e-4
  printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
  np.testing.assert_allclose(measurement.table, printed, atol=1e-4)

  ratios = list(measurement.table[0])  # diffusers has one list for both branches
  for threshold, max_skip in ((0.03, 2), (0.1, 2), (0.3, 4)):
    step_cache = StepCache(ratios=[ratios] * 2, threshold=threshold, max_skip=max_skip)
    plan, ours = sample(step_cache)
    settings = {"mag_ratios": ratios, "threshold": threshold, "max_skip_steps": max_skip, "retention_ratio": 0.2}
    expected, computed = sample_theirs(plan, settings)
    schedule = plan.computed_steps([0] * len(plan.sigmas), plan.guided_steps() & guided)
    for branch in computed:
      assert (np.ones(len(branch), bool) if schedule is None else schedule[0]).tolist() == branch.astype(bool).tolist()
    assert relative_error(ours, expected) <= 1e-4
  assert schedule is not None and relative_error(ours, dense) > 1e-3


@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_distilled_sigmas(shift):
  """Computed in float32 by PyTorch, as LightX2V does."""
  grid = torch.linspace(1.0, 0.0, 1001)[:-1]
  grid = shift * grid / (1 + (shift - 1) * grid)
  expected = grid[[1000 - place for place in (1000, 750, 500, 250)]].numpy()
  assert np.abs(SOLVERS["distilled"].sigmas(FlowMatching(shift=shift), 4) - expected).max() <= 1e-7


@pytest.mark.parametrize("name", VARIANTS)
def test_number_of_parameters(name):
  """At full size, on PyTorch's meta device."""
  options = {key: value for key, value in diffusers_config(VARIANTS[name]).items() if key != "_class_name"}
  with torch.device("meta"):
    theirs = diffusers.WanTransformer3DModel(**options)
  ours = nnx.state(nnx.eval_shape(lambda: DiT(VARIANTS[name], rngs=nnx.Rngs(0))), nnx.Param)
  assert sum(x.size for x in jax.tree.leaves(ours)) == sum(x.numel() for x in theirs.parameters())


@pytest.mark.parametrize("version", AUTOENCODERS)
def test_number_of_parameters_of_an_autoencoder(version):
  with torch.device("meta"):
    theirs = diffusers.AutoencoderKLWan(**autoencoder_options(AUTOENCODERS[version]))
  ours = nnx.state(nnx.eval_shape(lambda: VAE(AUTOENCODERS[version], rngs=nnx.Rngs(0))), nnx.Param)
  assert sum(x.size for x in jax.tree.leaves(ours)) == sum(x.numel() for x in theirs.parameters())


@pytest.mark.long  # by default they are compared with goldens
@pytest.mark.parametrize("version", AUTOENCODERS)
def test_autoencoder(rng, version):
  dim, decoder_dim = 4 * int(rng.integers(1, 4)), 4 * int(rng.integers(1, 4))
  if version == "wan2.1":
    decoder_dim = dim
  config = dataclasses.replace(AUTOENCODERS[version], dim=dim, decoder_dim=decoder_dim)
  theirs = randomize(diffusers.AutoencoderKLWan(**autoencoder_options(config)))
  ours = load("vae", lambda: VAE(config, rngs=nnx.Rngs(0)), official_weights("vae", theirs))
  stride = config.spatial_stride
  frames, height, width = 4 * int(rng.integers(0, 4)) + 1, *(stride * int(n) for n in rng.integers(1, 5, 2))
  video = rng.uniform(-1, 1, (frames, height, width, 3)).astype(np.float32)
  with torch.no_grad():
    mean = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 0))[None]).latent_dist.mode()
    decoded = theirs.decode(mean, return_dict=False)[0]
  latents = (np.moveaxis(mean[0].numpy(), 0, -1) - np.array(config.latent_mean)) / np.array(config.latent_std)
  assert relative_error(jax.jit(ours.encode)(video), latents) <= 1e-4
  ours_decoded = np.clip(jax.jit(ours.decode)(latents.astype(np.float32)), -1, 1)
  assert relative_error(ours_decoded, np.moveaxis(decoded[0].numpy(), 0, -1)) <= 1e-4


def test_text_encoder(rng):
  heads, head_dim, layers = int(rng.integers(1, 5)), int(rng.integers(4, 17)), int(rng.integers(1, 4))
  dim, ffn = int(rng.integers(16, 64)), int(rng.integers(16, 99))
  theirs = randomize(
    transformers.UMT5EncoderModel(
      transformers.UMT5Config(
        vocab_size=99, d_model=dim, d_kv=head_dim, d_ff=ffn, num_layers=layers, num_heads=heads, dropout_rate=0.0
      )
    )
  )
  config = UMT5Config(
    vocab_size=99, dim=dim, attention_dim=heads * head_dim, ffn_dim=ffn, num_heads=heads, num_layers=layers
  )
  ours = load("text_encoder", lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)), official_weights("text_encoder", theirs))
  ids, length = rng.integers(0, 99, (2, 200)), int(rng.integers(1, 200))
  mask = np.arange(200) < np.array([[length], [200]])
  with torch.no_grad():
    expected = theirs(
      torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))
    ).last_hidden_state.numpy()
  assert relative_error(np.asarray(ours(jnp.asarray(ids), jnp.asarray(mask)))[mask], expected[mask]) <= 2e-5
