"""Conversion of base weights: exact in both directions, all or nothing, and errors name what is wrong."""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import univid_jax
from tests.checkpoint_files import write_safetensors
from tests.commands import environment, run_here
from tests.helpers import GOLDENS, left_by_killed, make_old, package_or_skip
from univid_jax.checkpoints.experts import find_expert
from univid_jax.checkpoints.info import is_checkpoint, read_info
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.tensor_files import TensorInfo, open_tensors
from univid_jax.codecs.wan_vae import VAEConfig
from univid_jax.convert.commands import convert_any, inspect, verify
from univid_jax.convert.component_configs import infer_config
from univid_jax.convert.destination import atomic_folder, check_destination
from univid_jax.convert.export import original_tensors
from univid_jax.convert.layout import make_fills
from univid_jax.convert.outputs import OUTPUTS
from univid_jax.convert.release_configs import diffusers_config, official_config, require_readable
from univid_jax.convert.sources import find_release
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, ModelType
from univid_jax.core.unfinished import find_unfinished, unfinished_path
from univid_jax.models.names import name_from_diffusers, name_to_diffusers
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import VARIANTS, DiTConfig

torch = package_or_skip("torch", reason="the release contains PyTorch files; needs the extra `convert`")

RELEASE = GOLDENS / "tiny_wan"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def whole_release(tmp_path):
  """A copy of the miniature release that tests may modify."""
  folder = tmp_path / "release"
  shutil.copytree(RELEASE, folder)
  (folder / "univid_lora.ckpt").unlink()
  return folder


@pytest.fixture
def release(tmp_path):
  """Its transformer alone, a quarter of the work, where other components do not matter."""
  folder = tmp_path / "release"
  folder.mkdir()
  for name in (WEIGHTS, "config.json"):
    shutil.copy(RELEASE / name, folder)
  return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(RELEASE), str(folder))
  return folder


def checksum(folder):
  return read_info(folder).components["transformer"].checksum


def checksums(folder):
  return {name: info.checksum for name, info in read_info(folder).components.items()}


def change(release, edit):
  """Edits the tensors of the transformer's file."""
  tensors = load_file(release / WEIGHTS)
  edit(tensors)
  save_file(tensors, release / WEIGHTS)


def assert_refused(release, message, **options):
  """Asserts that the conversion fails with a message and leaves nothing behind."""
  target = release.parent / "target"
  with pytest.raises((ValueError, OSError), match=message):
    convert_any(str(release), str(target), **options)
  assert sorted(path.name for path in release.parent.iterdir()) == ["release"]


class TestRoundTrips:
  def test_original(self, converted, tmp_path):
    convert_any(str(converted), str(tmp_path / "back"), to="original")
    for file in (WEIGHTS, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
      before, after = open_tensors(RELEASE / file), open_tensors(tmp_path / "back" / file)
      assert before.infos == after.infos
      assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.infos)
    expected = {key: value for key, value in json.loads((RELEASE / "config.json").read_text()).items() if key[0] != "_"}
    assert {
      key: value for key, value in json.loads((tmp_path / "back" / "config.json").read_text()).items() if key[0] != "_"
    } == expected | {"text_dim": 48}, "which Wan's class needs: it is not the default"
    tokenizer = "google/umt5-xxl/tokenizer.json"
    assert (tmp_path / "back" / tokenizer).read_bytes() == (RELEASE / tokenizer).read_bytes()

  def test_diffusers(self, converted, tmp_path):
    """Converts files that diffusers and transformers have loaded and saved."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    convert_any(str(converted), str(tmp_path / "ours"), to="diffusers")
    theirs = tmp_path / "theirs"
    for part, module in (
      ("transformer", diffusers.WanTransformer3DModel),
      ("vae", diffusers.AutoencoderKLWan),
      ("text_encoder", transformers.UMT5EncoderModel),
    ):
      kind = (
        {"output_loading_info": True}
        if part != "text_encoder"
        else {"output_loading_info": True, "dtype": torch.bfloat16}
      )
      loaded, info = module.from_pretrained(tmp_path / "ours" / part, **kind)
      assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
      loaded.save_pretrained(theirs / part)
    shutil.copytree(tmp_path / "ours" / "tokenizer", theirs / "tokenizer")
    convert_any(str(theirs), str(tmp_path / "again"))
    assert checksums(tmp_path / "again") == checksums(converted)
    before, after = read_info(converted), read_info(tmp_path / "again")
    assert all(before.components[name].config == after.components[name].config for name in before.components)

  def test_shards(self, converted, tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    tensors = load_file(RELEASE / WEIGHTS)
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
      save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(RELEASE / "config.json", folder)
    convert_any(str(folder), str(tmp_path / "target"))
    assert checksums(tmp_path / "target")["transformer"] == checksums(converted)["transformer"]
    (folder / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {files[1]}"):
      convert_any(str(folder), str(tmp_path / "other"))
    index.unlink()
    with pytest.raises(
      FileNotFoundError, match=r"its index diffusion_pytorch_model\.safetensors\.index\.json is missing"
    ):
      convert_any(str(folder), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is shard 1 of 2"):
      convert_any(str(folder / files[0]), str(tmp_path / "other"))

  @pytest.mark.parametrize(
    "component, config",
    [("transformer", VARIANTS["wan2.1-i2v-14b-480p"]), ("vae", VAEConfig()), ("text_encoder", UMT5Config())],
  )
  def test_diffusers_names(self, component, config):
    names = [name for fill in make_fills(component, config) for name in fill.names]
    theirs = [name_to_diffusers(component, name) for name in names]
    assert len(set(names)) == len(set(theirs)) == len(names)
    assert [name_from_diffusers(component, name) for name in theirs] == names

  def test_single_files_and_prefixes(self, converted, tmp_path):
    """A single file, and one with ComfyUI's prefix."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(RELEASE / WEIGHTS).items()}
    (tmp_path / "config.json").write_text((RELEASE / "config.json").read_text())
    save_file(tensors, tmp_path / "wan.safetensors")
    convert_any(str(tmp_path / "wan.safetensors"), str(tmp_path / "target"))
    assert checksums(tmp_path / "target") == {"transformer": checksums(converted)["transformer"]}
    convert_any(str(RELEASE / "Wan2.1_VAE.pth"), str(tmp_path / "vae"))
    assert checksums(tmp_path / "vae") == {"vae": checksums(converted)["vae"]}

  def test_image_tower(self, tmp_path):
    """The parts of the release's CLIP model that Wan2.1 does not use are listed and left out."""
    weights = load_file(GOLDENS / "clip_vision.weights.safetensors")
    tower = {f"visual.{name}": torch.from_numpy(value) for name, value in weights.items()}
    text = {"textual.model.embeddings.weight": torch.zeros(3, 2), "log_scale": torch.zeros(())}
    torch.save(tower | text, tmp_path / "models_clip.pth")
    assert "the text tower (2 tensors)" in inspect(str(tmp_path / "models_clip.pth"))
    convert_any(str(tmp_path / "models_clip.pth"), str(tmp_path / "target"))
    info = read_info(tmp_path / "target").components["image_encoder"]
    assert info.config["num_layers"] == 3 and info.config["image_size"] == 28

  def test_dtype(self, release, tmp_path):
    convert_any(str(release), str(tmp_path / "low"), dtype="bfloat16")
    assert read_info(tmp_path / "low").components["transformer"].dtypes == {"bfloat16": 96}
    convert_any(str(tmp_path / "low"), str(tmp_path / "back"), to="original")
    before, after = load_file(RELEASE / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(np.array_equal(before[name].astype(ml_dtypes.bfloat16), after[name]) for name in before)


class TestVerify:
  @pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.long)])
  def test_equal(self, converted, tmp_path, monkeypatch, is_whole):
    """The tensors of all components and the transformer's output; or all outputs, of a release yet to be converted."""
    pytest.importorskip("diffusers", reason="needs the extra `parity`")
    if not is_whole:
      monkeypatch.setattr("univid_jax.convert.verify.OUTPUTS", {"transformer": OUTPUTS["transformer"]})
    text, equal = verify(str(RELEASE), str(tmp_path / "target" if is_whole else converted))
    assert equal and text.count("equal bit for bit") == 3, text
    assert text.count("against PyTorch") == (3 if is_whole else 1), text
    assert text.endswith(", bit for bit, and its outputs equal PyTorch's"), text

  def test_the_verdict_says_what_was_not_compared(self, converted, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else found(name))
    text, equal = verify(str(RELEASE), str(converted))
    verdict = text.splitlines()[-1]
    assert equal and text.count("not compared with PyTorch") == 4, text
    assert "bit for bit; its outputs were not compared with PyTorch's, as diffusers is not installed" in verdict
    assert "pip install -e" in verdict and "[parity]'" in verdict

  def test_different_source(self, converted, whole_release, monkeypatch):
    monkeypatch.setattr("univid_jax.convert.verify.OUTPUTS", {})  # compares tensors only
    change(whole_release, lambda tensors: tensors["blocks.1.ffn.0.bias"].__setitem__(3, 7.0))
    text, equal = verify(str(whole_release), str(converted))
    assert not equal and "1 of 96 tensors differ" in text and "blocks.1.ffn.0.bias" in text, text


def test_options_of_other_sources_are_refused(release, tmp_path):
  for source, option in (("small", "allow_missing"), (str(release), "lora_skip_unmatched")):
    with pytest.raises(UserError, match=f"--{option} is for .*: leave it out"):
      convert_any(source, str(tmp_path / "x"), **{option: ["x"]})


class TestStrict:
  def test_extra(self, release):
    change(release, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    assert_refused(release, "not used: extra")

  def test_missing(self, release):
    change(release, lambda tensors: tensors.update({"blocks.0.norm3.waight": tensors.pop("blocks.0.norm3.weight")}))
    assert_refused(
      release, r"missing: blocks.0.norm3.weight \(similar: blocks.0.norm3.waight\); not used: blocks.0.norm3.waight"
    )

  def test_allow_missing(self, release, tmp_path, caplog):
    change(release, lambda tensors: [tensors.pop(f"blocks.{i}.norm3.weight") for i in range(3)])
    assert_refused(release, "missing: blocks.0.norm3.weight")
    convert_any(str(release), str(tmp_path / "target"), allow_missing=["blocks.*.norm3.weight", "x*"])
    assert caplog.messages == ["--allow_missing=x* has no effect: nothing of that name is missing"]
    convert_any(str(tmp_path / "target"), str(tmp_path / "back"), to="original")
    assert (load_file(tmp_path / "back" / WEIGHTS)["blocks.2.norm3.weight"] == 1).all()

  def test_wrong_shape(self, release):
    change(release, lambda tensors: tensors.update({"blocks.0.ffn.2.weight": np.zeros((96, 161), np.float32)}))
    assert_refused(release, r"wrong shape: blocks.0.ffn.2.weight is \(96, 161\) instead of \(96, 160\)")

  def test_wrong_dtype(self, release):
    change(release, lambda tensors: tensors.update({"blocks.0.ffn.2.weight": np.zeros((96, 160), np.int32)}))
    assert_refused(release, "blocks.0.ffn.2.weight has the dtype int32, which is not supported")

  def test_config_mismatch(self, release):
    values = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**values, "num_layers": 4}))
    assert_refused(release, "config.json has num_layers = 4, but the tensors have 3")
    (release / "config.json").write_text(json.dumps({**values, "model_type": "flf2v"}))
    assert_refused(release, "'flf2v', which is not supported")
    (release / "config.json").unlink()
    assert_refused(release, "cannot infer the number of heads")

  def test_unsupported_variant(self, release):
    change(release, lambda tensors: tensors.update({"vace_blocks.0.before_proj.weight": np.zeros((2, 2), np.float32)}))
    assert_refused(release, "is a VACE model, which is not supported")

  def test_duplicate_component(self, release):
    shutil.copy(release / WEIGHTS, release / "copy.safetensors")
    assert_refused(release, "has two files for transformer")


class TestDamaged:
  def test_truncated(self, whole_release):
    for name, message in (
      (WEIGHTS, "not a complete safetensors file"),
      ("Wan2.1_VAE.pth", "not a complete PyTorch file"),
    ):
      whole = (whole_release / name).read_bytes()
      (whole_release / name).write_bytes(whole[: len(whole) // 2])
      assert_refused(whole_release, message)
      (whole_release / name).write_bytes(whole)

  def test_text_file(self, release):
    (release / WEIGHTS).write_text("hello, these are not weights")
    assert_refused(release, "not a complete safetensors file")

  def test_malicious_pickle(self, whole_release, tmp_path):
    class Evil:
      def __reduce__(self):
        return os.system, (f"touch {whole_release}/ran",)

    torch.save({"x": Evil()}, whole_release / "Wan2.1_VAE.pth")
    assert_refused(whole_release, "code in it is never run")
    assert not (whole_release / "ran").exists()

  def test_without_pytorch(self, monkeypatch):
    """safetensors files need no PyTorch; for others the error names the extra."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "96 tensors" in inspect(str(RELEASE / WEIGHTS))
    with pytest.raises(UserError, match=r"needs PyTorch: pip install -e .*\[convert\]'"):
      inspect(str(RELEASE / "Wan2.1_VAE.pth"))

  def test_unknown_tensors(self, tmp_path):
    save_file({"a": np.zeros(2), "b": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not a known component of Wan \(its first tensors are a, b\)"):
      inspect(str(tmp_path / "x.safetensors"))


class TestAtomicWriting:
  def test_existing_destination(self, release, converted, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="--force"):
      convert_any(str(release), str(target))
    with pytest.raises(UserError, match=r"target contains mine: --force replaces only empty folders and what"):
      convert_any(str(release), str(target), force=True)
    assert (target / "mine").exists()
    (target / "mine").unlink()
    convert_any(str(release), str(target), force=True)
    (target / "step_cache.json").write_text("{}")
    convert_any(str(release), str(target), force=True)
    assert not (target / "step_cache.json").exists() and checksum(target) == checksum(converted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "target"]

  def test_disk_too_small(self, whole_release, monkeypatch):
    usage = shutil.disk_usage(whole_release)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert_refused(whole_release, r"needs .* MB, .* has 1\.00 MB free")

  def test_killed_conversion_frees_its_space(self, tmp_path, monkeypatch):
    """What a killed conversion has left is removed before the space is checked; that of others is named."""
    usage = shutil.disk_usage(tmp_path)
    other = left_by_killed(tmp_path / "other")
    for path in (left_by_killed(tmp_path / "target"), other):
      path.mkdir()
      (path / "weights").write_bytes(bytes(1_000_000))

    def free(path):
      return usage._replace(free=3_000_000 - sum(file.stat().st_size for file in tmp_path.glob(".partial-*/weights")))

    monkeypatch.setattr(shutil, "disk_usage", free)
    message = rf"needs 2\.50 MB, .* has 2\.00 MB free; {other.name} in it are of conversions"
    with pytest.raises(OSError, match=message), atomic_folder(tmp_path / "target", needed=2_500_000, force=False):
      pass
    with atomic_folder(tmp_path / "target", needed=2_000_000, force=False) as folder:
      assert not list(folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "target"]

  def test_killed_while_replacing(self, tmp_path):
    """A destination that was about to be replaced is restored, or removed if it has been replaced."""
    target, old = tmp_path / "target", tmp_path / ".old-target"
    old.mkdir()
    (old / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="--force"), atomic_folder(target, needed=0, force=False):
      pass
    assert (target / "mine").exists() and not old.exists()
    old.mkdir()
    (target / "mine").unlink()
    with atomic_folder(target, needed=0, force=True):
      pass
    assert not old.exists()

  def test_two_conversions_at_once(self, tmp_path):
    with (
      atomic_folder(tmp_path / "target", needed=0, force=False),
      pytest.raises(UserError, match=rf"another process is writing .*/target: wait for process {os.getpid()} on "),
    ):
      check_destination(tmp_path / "target", needed=0, force=True)

  def test_conversions_that_begin_at_the_same_time(self, tmp_path, monkeypatch):
    """The second check finds what the first could not see yet."""
    other = left_by_killed(tmp_path / "target", machine="f" * 8)
    make, begun = Path.mkdir, []

    def mkdir(path, *args, **options):
      make(path, *args, **options)
      if not begun:
        begun.append(path)
        make(other)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UserError, match="another process"), atomic_folder(tmp_path / "target", needed=0, force=False):
      pass
    assert list(tmp_path.iterdir()) == [other]

  def test_conversion_on_another_machine(self, tmp_path):
    """Nobody knows whether its process is alive; nothing of it is removed as long as it may be."""
    (other := left_by_killed(tmp_path / "target", machine="f" * 8)).mkdir()
    (other / "weights").write_bytes(b"half")
    with pytest.raises(UserError, match=rf"was killed on another machine: wait for it, or remove .*/{other.name}"):
      check_destination(tmp_path / "target", needed=0, force=True)
    make_old(other, other / "weights")
    check_destination(tmp_path / "target", needed=0, force=True)
    assert not list(tmp_path.iterdir())

  def test_leftovers_of_a_file(self, tmp_path):
    target = tmp_path / "lora.safetensors"
    left = {
      "killed": left_by_killed(target),
      "own": unfinished_path(target),
      "elsewhere": left_by_killed(target, machine="f" * 8),
      "killed elsewhere": left_by_killed(target, machine="e" * 8),
    }
    for path in left.values():
      path.write_bytes(b"half")
    make_old(left["killed"], left["killed elsewhere"])
    check_destination(target, needed=0, force=False, is_file=True)
    assert set(tmp_path.iterdir()) == {left["own"], left["elsewhere"]}

  def test_full_disk_is_named(self, release, monkeypatch):
    """Libraries say it in errors of many types; TensorStore's looks like one of memory."""

    def fail(*args):
      raise ValueError('RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device [os_error=28]')

    monkeypatch.setattr("univid_jax.convert.checkpoint_writer.create_arrays", fail)
    assert_refused(release, r"the disk was full before .*/target was complete, which needs up to .* MB")

  def test_no_temporary_space(self, whole_release, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    convert_any(str(whole_release), str(tmp_path / "target"))
    convert_any(str(tmp_path / "target"), str(tmp_path / "back"), to="original")
    assert (tmp_path / "back" / WEIGHTS).is_file() and is_checkpoint(tmp_path / "target")

  def test_small_file_system(self, whole_release):
    """The space that is asked for suffices, to the last file, and less is refused."""
    mount = whole_release.parent / "mount"
    mount.mkdir()

    def convert(size):
      options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
      if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
      try:
        convert_any(str(whole_release), str(mount / "target"))
        return is_checkpoint(mount / "target")
      finally:
        subprocess.run(["umount", str(mount)], check=True)

    with pytest.raises(OSError, match=r"needs (.*) MB, .* has 204.80 kB free") as refusal:
      convert(204800)
    assert convert(round(float(re.search(r"needs (.*?) MB", str(refusal.value))[1]) * 1e6) + 8192)

  @pytest.mark.long
  def test_disk_fills_up(self, release):
    """A limit on file sizes simulates a disk that fills up after the check."""
    command = f"ulimit -f 45; exec {sys.executable} -m tools.convert_weights {release} {release.parent}/target"
    variables = environment(torch=False)
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, env=variables)
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith("error: "), run.stderr
    assert sorted(path.name for path in release.parent.iterdir()) == ["release"]

  def test_killed(self, release, converted):
    """A killed conversion leaves no destination, and a rerun removes its partial folder."""
    command = [sys.executable, "-m", "tools.convert_weights", str(release), str(release.parent / "target")]
    process = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(torch=False)
    )
    target = release.parent / "target"
    while not find_unfinished(target) and process.poll() is None:
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert find_unfinished(target) and not target.exists()
    convert_any(str(release), str(target))
    assert checksum(target) == checksum(converted) and not find_unfinished(target)


@pytest.mark.long
def test_a_process_prints_its_error_alone():
  """Whatever is imported on the way."""
  run = subprocess.run(
    [sys.executable, "-m", "tools.convert_weights", "nowhere", "target"], capture_output=True, text=True, timeout=120
  )
  assert run.returncode == 1 and run.stderr == "error: no such file or folder: nowhere\n"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "SRC and DST"),
    (["--inspect"], "SRC"),
    (["a", "b", "c"], "unexpected argument 'c'"),
    (["a", "b", "--to=caffe"], "caffe"),
  ],
)
def test_one_line_errors(arguments, message, capfd):
  code = run_here("univid_jax.convert.__main__", *arguments)
  stderr = capfd.readouterr().err
  assert code != 0 and message in stderr and len(stderr.strip().splitlines()) == 1, stderr


# Every field differs from its default, but for what only I2V models have.
ODD = DiTConfig(
  dim=24,
  ffn_dim=20,
  num_heads=3,
  num_layers=2,
  model_type=ModelType.TI2V,
  in_dim=6,
  out_dim=6,
  freq_dim=10,
  text_dim=14,
  text_len=9,
  patch_size=(1, 4, 2),
  eps=1e-5,
  rope_theta=10.0,
  rope_scale=1.57,
)
ODD_I2V = dataclasses.replace(ODD, model_type=ModelType.I2V, in_dim=16, image_dim=28)


class TestConfigs:
  """A component's config.json and tensors tell all of its config."""

  @staticmethod
  def infos(component, config):
    fills = make_fills(component, config)
    return {name: TensorInfo(fill.original_shape, "float32") for fill in fills for name in fill.names}

  def test_odd(self):
    names = {field.name for field in dataclasses.fields(DiTConfig) if getattr(ODD, field.name) == field.default}
    assert names == {"image_dim"} and ODD_I2V.image_dim != DiTConfig.image_dim

  def test_official(self):
    config = VARIANTS["wan2.1-t2v-1.3b"]
    assert official_config(config)["num_heads"] == 12 and "rope_theta" not in official_config(config)
    assert DiTConfig.from_json(official_config(config)) == config

  @pytest.mark.parametrize("config", [*dict.fromkeys(VARIANTS.values()), ODD, ODD_I2V])
  def test_transformers(self, config):
    same_rope = dataclasses.replace(config, rope_theta=10000.0, rope_scale=1.0)
    for written, values in ((config, official_config(config)), (same_rope, diffusers_config(same_rope))):
      found = infer_config("transformer", self.infos("transformer", written), json.loads(json.dumps(values)))
      assert found == written
      require_readable("transformer_2", written, self.infos("transformer", written), values)

  @pytest.mark.parametrize(
    ("component", "config", "write", "lost"),
    [
      ("transformer", ODD, diffusers_config, r"rope_theta = 10\.0, rope_scale = 1\.57"),
      ("text_encoder", UMT5Config(vocab_size=9, num_layers=1, eps=1e-5), lambda config: {}, "eps = 1e-05"),
      ("vae", VAEConfig(latent_mean=(0.5,) * 16), lambda config: {}, "latent_mean"),
      ("vae", VAEConfig(temporal_downsample=(True, False, True)), diffusers_config, "temporal_downsample"),
    ],
  )
  def test_what_would_be_lost_is_refused(self, component, config, write, lost):
    with pytest.raises(UserError, match=f"cannot say that the {component} has {lost}"):
      require_readable(component, config, self.infos(component, config), write(config))

  def test_others(self):
    for component, config in (
      ("text_encoder", UMT5Config(vocab_size=9, num_layers=1, num_heads=32, num_buckets=8, eps=1e-5)),
      ("vae", VAEConfig(dim=8, decoder_dim=16, latent_mean=(0.5,) * 16, latent_std=(2.0,) * 16)),
    ):
      require_readable(component, config, self.infos(component, config), diffusers_config(config))
    with pytest.raises(UserError, match="layer_norm_epsilon = 0, expected a positive number"):
      infer_config("text_encoder", {}, {"layer_norm_epsilon": 0})


def test_the_small_base_there_and_back(tmp_path):
  """With its rotary frequencies, its codec and how it is run."""
  convert_any("small", str(tmp_path / "release"), to="original")
  convert_any(str(tmp_path / "release"), str(tmp_path / "back"))
  before, after = read_info("small"), read_info(tmp_path / "back")
  assert after.components["transformer"].config == before.components["transformer"].config
  assert (after.codec, after.usage) == (before.codec, before.usage)
  first, second = (
    original_tensors(PretrainedCheckpoint.open(path), "transformer") for path in ("small", tmp_path / "back")
  )
  assert first.infos == second.infos and all((first.read(name) == second.read(name)).all() for name in first.infos)
  with pytest.raises(UserError, match=r"cannot be written in the layout diffusers: .* has rope_theta = 10\.0"):
    convert_any("small", str(tmp_path / "diffusers"), to="diffusers")
  values = json.loads((tmp_path / "release" / "config.json").read_text())
  for own in ({"codec": {"latent_channels": 0}}, {"codec": {"other": 1}}, {"usage": 3}, 3):
    (tmp_path / "release" / "config.json").write_text(json.dumps({**values, "univid_jax": own}))
    with pytest.raises(UserError, match=r"config\.json has univid_jax"):
      convert_any(str(tmp_path / "release"), str(tmp_path / "other"))


def test_layer_of_zeros(release, tmp_path):
  """The storage format leaves out chunks of zeros unless told otherwise."""
  change(release, lambda tensors: tensors["blocks.1.ffn.0.bias"].fill(0))
  convert_any(str(release), str(tmp_path / "target"))
  convert_any(str(tmp_path / "target"), str(tmp_path / "back"), to="original")
  before, after = load_file(release / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
  assert all(np.array_equal(before[name], after[name]) for name in before)


class TestNonfinite:
  def test_reported(self, release, tmp_path, caplog):
    """By name and count: by the converter, in the checkpoint, and when it is loaded."""

    def edit(tensors):
      tensors["blocks.1.ffn.0.bias"][3] = np.nan
      tensors["head.head.weight"][0, :2] = np.inf, -np.inf

    change(release, edit)
    message = "3 numbers are NaN or infinite, in blocks.1.ffn.0.bias (1), head.head.weight (2)"
    assert f"transformer: {message}" in convert_any(str(release), str(tmp_path / "target"))
    info = read_info(tmp_path / "target").components["transformer"]
    assert info.nonfinite == {"blocks.1.ffn.0.bias": 1, "head.head.weight": 2}
    assert message in inspect(str(tmp_path / "target"))
    caplog.set_level(logging.WARNING)
    univid_jax.load_pipeline(str(tmp_path / "target"))
    assert "3 numbers of the transformer are NaN or infinite, the first in blocks.1.ffn.0.bias" in caplog.text

  def test_overflow(self, release):
    """A dtype that is too small is refused, because the file has finite numbers."""
    change(release, lambda tensors: tensors["blocks.1.ffn.0.bias"].__setitem__(3, 1e6))
    assert_refused(release, "1 numbers of blocks.1.ffn.0.bias are too large for float16", dtype="float16")


class TestExperts:
  """One expert of Wan2.2 A14B has the tensors of Wan2.1's T2V-14B: only names tell."""

  @pytest.mark.parametrize(
    "path, metadata, expert",
    [
      ("Wan2.2-T2V-A14B/high_noise_model/diffusion_pytorch_model.safetensors", {}, "high"),
      ("low_noise_model/diffusion_pytorch_model.safetensors.index.json", {}, "low"),
      ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", {}, "high"),
      ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", {}, "low"),
      ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", {}, "high"),
      ("model.safetensors", {"modelspec.title": "Wan2.2 T2V 14B low noise"}, "low"),
      ("model.gguf", {"general.name": "Wan 2.2 T2V A14B"}, "unknown"),
      ("A14B/model.safetensors", {}, "unknown"),
      ("wan2.2/Wan2_1-T2V-14B_fp8_high.safetensors", {}, None),
      ("wan2.1_t2v_14B_bf16.safetensors", {"format": "pt"}, None),
      ("high_quality/model.safetensors", {}, None),
    ],
  )
  def test_names(self, path, metadata, expert):
    assert find_expert(Path("/models") / path, metadata, VARIANTS["wan2.1-t2v-14b"]) == expert

  def test_folders_of_diffusers(self, tmp_path):
    config = VARIANTS["wan2.1-t2v-14b"]
    for name, expert in (("transformer", None), ("transformer_2", Expert.LOW), ("transformer", Expert.HIGH)):
      (tmp_path / name).mkdir(exist_ok=True)
      assert find_expert(tmp_path / name / "model.safetensors", {}, config) == expert

  def test_converted(self, release, tmp_path, caplog):
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    for name in (WEIGHTS, "config.json"):
      shutil.copy(release / name, folder)
    assert "Wan2.2 A14B, the high-noise expert, custom" in inspect(str(folder))
    assert "Wan2.2 A14B, the high-noise expert" in convert_any(str(folder), str(tmp_path / "target"))
    assert read_info(tmp_path / "target").expert == "high"
    caplog.set_level(logging.WARNING)
    univid_jax.load_pipeline(str(tmp_path / "target"))
    assert "is one expert of Wan2.2 A14B (high)" in caplog.text

  def test_both(self, release, tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
      (tmp_path / "a14b" / name).mkdir(parents=True)
      shutil.copy(release / WEIGHTS, tmp_path / "a14b" / name)
      shutil.copy(release / "config.json", tmp_path / "a14b" / name)
    found = find_release(tmp_path / "a14b")
    assert found.has_both_experts and [source.expert for source in found.sources] == ["high", "low"]
    (tmp_path / "a14b" / "low_noise_model").rename(tmp_path / "a14b" / "high_noise_model_2")
    with pytest.raises(UserError, match=r"two experts of Wan2.2 A14B, .* \(high\) and .* \(high\)"):
      find_release(tmp_path / "a14b")

  def test_when_nothing_tells(self, tmp_path, monkeypatch):
    """The file itself could be of Wan2.1 or Wan2.2."""
    config = DiTConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1, freq_dim=32, text_dim=32)
    fills = make_fills("transformer", config)
    tensors = {name: np.zeros(fill.original_shape, np.float32) for fill in fills for name in fill.names}
    monkeypatch.setattr("univid_jax.convert.sources.VARIANTS", {"wan2.1-t2v-14b": config})
    note = "it could be an expert of Wan2.2 T2V-A14B"
    assert note in inspect(str(write_safetensors(tmp_path / "some_14b.safetensors", tensors)))
    assert note not in inspect(str(write_safetensors(tmp_path / "wan2.1_14b.safetensors", tensors)))

  @pytest.mark.parametrize(
    "in_dim, out_dim, message",
    [
      (52, 16, "it is a Fun-Control model, which is not supported"),
      (20, 16, "an I2V model with out_dim 16 has in_dim 36, got 20"),
    ],
  )
  def test_other_models(self, release, in_dim, out_dim, message):
    def edit(tensors):
      tensors["patch_embedding.weight"] = np.zeros((96, in_dim, 1, 2, 2), np.float32)
      tensors["head.head.weight"] = np.zeros((out_dim * 4, 96), np.float32)

    change(release, edit)
    (release / "config.json").write_text(json.dumps({"num_heads": 4}))
    with pytest.raises(UserError, match=message):
      find_release(release)

  def test_other_autoencoder(self, tmp_path):
    shapes = {
      "encoder.conv1.weight": (8, 3, 3, 3, 3),
      "encoder.middle.1.to_qkv.weight": (96, 32, 1, 1),
      "decoder.head.0.gamma": (8, 1, 1, 1),
      "conv2.weight": (32, 32, 1, 1, 1),
    }
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=r"there is no autoencoder with 32 latent channels, only with 16 \(wan2\.1\)"):
      find_release(write_safetensors(tmp_path / "vae.safetensors", tensors))
