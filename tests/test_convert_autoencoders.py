"""Conversion of Wan2.2's autoencoder, and what the rest of a run learns from a checkpoint's autoencoder."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.helpers import GOLDENS, GOLDENS22
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, component_config
from univid_jax.checkpoints.run_parts import codec_shape
from univid_jax.checkpoints.sentence_lengths import check_rows
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.codecs.vae_config import AUTOENCODERS
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.convert.commands import convert_any, verify
from univid_jax.convert.layout import make_fills
from univid_jax.core.errors import UserError
from univid_jax.models.names import diffusers_table, name_from_diffusers, name_to_diffusers
from univid_jax.parallel.mesh import make_mesh

WEIGHTS = GOLDENS22 / "tiny_wan22_ti2v" / "Wan2.2_VAE.pth"
CONFIG = dataclasses.replace(AUTOENCODERS["wan2.2"], dim=8, decoder_dim=12)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  pytest.importorskip("torch", reason="the weights are a PyTorch file; needs the extra `convert`")
  folder = tmp_path_factory.mktemp("converted") / "vae22"
  convert_any(str(WEIGHTS), str(folder))
  return folder


@pytest.fixture(scope="module")
def in_diffusers(converted, tmp_path_factory):
  """The autoencoder after diffusers has loaded and saved it."""
  diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
  folder = tmp_path_factory.mktemp("diffusers")
  convert_any(str(converted), str(folder / "ours"), to="diffusers")
  loaded, info = diffusers.AutoencoderKLWan.from_pretrained(folder / "ours" / "vae", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  loaded.save_pretrained(folder / "theirs" / "vae")
  return folder / "theirs"


def test_official_weights_convert_and_convert_back(converted, tmp_path):
  assert PretrainedCheckpoint.open(converted).config("vae") == CONFIG
  convert_any(str(converted), str(tmp_path / "back"), to="original")
  before, after = open_tensors(WEIGHTS), open_tensors(tmp_path / "back" / "Wan2.2_VAE.pth")
  assert before.infos == after.infos
  assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.infos)


def test_diffusers_weights_convert(converted, in_diffusers, tmp_path):
  convert_any(str(in_diffusers), str(tmp_path / "again"))
  before, after = (read_info(folder).components["vae"] for folder in (converted, tmp_path / "again"))
  assert before.checksum == after.checksum and before.config == after.config


@pytest.mark.long
def test_outputs_are_verified(converted, in_diffusers):
  report, equal = verify(str(in_diffusers), str(converted))
  assert equal and "error against PyTorch" in report


def test_statistics_of_latents_in_config_json(converted, in_diffusers, tmp_path):
  """They are part of the checkpoint, and of the key under which latents are cached."""
  release = tmp_path / "release"
  shutil.copytree(in_diffusers, release)
  file = release / "vae" / "config.json"
  values = json.loads(file.read_text())
  mean = tuple(np.round(np.arange(48) / 48, 3).tolist())
  file.write_text(json.dumps(values | {"latents_mean": mean}))
  convert_any(str(release), str(tmp_path / "target"))
  bases = [PretrainedCheckpoint.open(folder) for folder in (converted, tmp_path / "target")]
  assert bases[1].config("vae") == dataclasses.replace(CONFIG, latent_mean=mean)
  assert bases[0].checksum("vae") == bases[1].checksum("vae")
  first, second = (PretrainedEncoders(base, make_mesh({"data": -1})).codec_fingerprint for base in bases)
  assert first != second
  for wrong, message in (
    (mean[1:], "latent_mean of the autoencoder must be 48 numbers from"),
    ([float("nan")] * 48, "latent_mean of the autoencoder must be 48 numbers from"),
    (["x"] * 48, "latents_mean = .*, expected a list of numbers"),
    (3.0, "latents_mean = 3.0, expected a list of numbers"),
  ):
    file.write_text(json.dumps(values | {"latents_mean": wrong}))
    with pytest.raises(UserError, match=message):
      convert_any(str(release), str(tmp_path / "other"))


def test_transformer_and_autoencoder_have_the_same_latents(converted, tmp_path):
  release = tmp_path / "release"
  release.mkdir()
  for file in (
    WEIGHTS,
    GOLDENS / "tiny_wan" / "config.json",
    GOLDENS / "tiny_wan" / "diffusion_pytorch_model.safetensors",
  ):
    shutil.copy(file, release)
  message = r"transformer of latents with 16 channels, but .*Wan2\.2_VAE\.pth is Wan2\.2's autoencoder, with 48"
  with pytest.raises(UserError, match=message):
    convert_any(str(release), str(tmp_path / "target"))


@pytest.mark.parametrize("version", AUTOENCODERS)
def test_names_in_diffusers(version):
  names = [name for fill in make_fills("vae", AUTOENCODERS[version]) for name in fill.names]
  theirs = [name_to_diffusers("vae", name) for name in names]
  table = diffusers_table("vae", theirs)
  assert len(set(names)) == len(set(theirs)) == len(names)
  assert [name_from_diffusers(table, name) for name in theirs] == names


def test_configs_of_earlier_checkpoints_are_wan21():
  values = {
    "dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temporal_downsample": [False, True, True],
    "latent_channels": 16,
  }
  assert component_config("vae", values) == AUTOENCODERS["wan2.1"]


class TestShapeOfLatents:
  def test_comes_from_the_base_the_variant_or_the_config(self, converted):
    shapes = [
      codec_shape(override(tiny(), changes))
      for changes in ({"init_from": str(converted)}, {"model.variant": "wan2.1-t2v-1.3b"}, {"codec.spatial_stride": 2})
    ]
    assert [shape.spatial_stride for shape in shapes] == [16, 8, 2]
    assert [shape.latent_channels for shape in shapes] == [48, 16, 16]

  def test_sizes_divide_into_patches(self):
    config = override(tiny(), {"model.variant": "wan2.1-t2v-1.3b", "data.height": 64, "data.width": 72})
    with pytest.raises(
      UserError,
      match=r"clips of 72 x 64 pixels \(width x height\): the width must be a multiple of 16, got 72; the near",
    ):
      check_rows(config)
