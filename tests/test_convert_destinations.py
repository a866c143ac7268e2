"""What conversions replace: never their source, and with --force only what conversions write."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from tests.helpers import GOLDENS, left_by_killed
from tests.stand_ins import open_bucket
from univid_jax.checkpoints.checksums import check_seal
from univid_jax.checkpoints.lora.folder import is_lora_folder
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import LoRALayer
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.usage import SOFTWARE, SOFTWARE_NAME, Usage
from univid_jax.cli.verification import verify
from univid_jax.config.boundary import to_json
from univid_jax.config.schema import FlowConfig, ModelConfig, RunConfig
from univid_jax.convert.commands import convert_any
from univid_jax.convert.destination import atomic_folder
from univid_jax.convert.replacement import check_apart
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention

WAN = GOLDENS / "tiny_wan" / "diffusion_pytorch_model.safetensors"


def small_lora(alpha=2.0):
  rng = np.random.default_rng(0)
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 24), (24, 4)))
  return LoRAWeights({f"blocks.{block}.self_attn.q.weight": LoRALayer(down, up, alpha) for block in (0, 2)}, "jax")


@pytest.fixture
def lora(tmp_path):
  """A LoRA file in a folder with other files."""
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "notes.txt").write_text("keep")
  write_lora(folder / "lo.safetensors", small_lora(), "comfyui")
  return folder / "lo.safetensors"


def assert_refused(source, destination, message, **options):
  """Asserts that a forced conversion is refused in one line, and that the files next to its source are kept."""
  before = {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()}
  with pytest.raises(UserError, match=message) as caught:
    convert_any(str(source), str(destination), force=True, **options)
  assert "\n" not in str(caught.value)
  assert {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()} == before


def test_paths_may_be_those_of_pathlib(lora, tmp_path):
  assert convert_any(lora, tmp_path / "out.safetensors", to="musubi").startswith(
    f"wrote {tmp_path / 'out.safetensors'}"
  )


@pytest.mark.parametrize("source", ["a LoRA", "a release"])
def test_unknown_dtypes_are_refused(lora, tmp_path, source):
  with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, got 'fp8x'"):
    convert_any(WAN if source == "a release" else lora, tmp_path / "out", dtype="fp8x")
  assert not (tmp_path / "out").exists()


class TestSource:
  def test_same(self, lora, tmp_path):
    assert_refused(lora, lora, r"lo\.safetensors is the source itself", to="diffusers")
    (tmp_path / "link.safetensors").symlink_to(lora)
    assert_refused(lora, tmp_path / "link.safetensors", "is the source itself", to="diffusers")
    (tmp_path / "hard.safetensors").hardlink_to(lora)
    assert_refused(lora, tmp_path / "hard.safetensors", "is the source itself", to="diffusers")

  def test_destination_contains_it(self, lora, tmp_path, monkeypatch):
    assert_refused(lora, lora.parent, r"mine contains the source .*lo\.safetensors")
    assert_refused(lora, tmp_path, "contains the source")
    (tmp_path / "link").symlink_to(lora.parent)
    assert_refused(lora, tmp_path / "link", "contains the source")
    monkeypatch.chdir(lora.parent)
    assert_refused(lora, ".", r"\. contains the source")

  def test_folders(self, lora, tmp_path):
    """A LoRA folder contains only what conversions write, and is kept as a source all the same."""
    convert_any(str(lora), str(folder := tmp_path / "runs" / "lo"))
    assert_refused(folder, folder, "is the source itself")
    assert_refused(folder, folder.parent, "contains the source")
    assert_refused(folder, folder / "lora", "is inside of the source")
    convert_any(str(folder), str(tmp_path / "runs" / "lo2"))

  def test_link_in_the_destination(self, lora, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link.safetensors").symlink_to(lora)
    assert_refused(tmp_path / "d" / "link.safetensors", tmp_path / "d", "contains the source")

  def test_workdir(self, tmp_path):
    """What is made of a run may be written next to its other results."""
    (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True)
    values = {key: value for key, value in to_json(RunConfig()).items() if key in ("model", "data", "rows")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    check_apart(tmp_path / "run", tmp_path / "run" / "base")
    check_apart(tmp_path / "run", tmp_path / "run2")
    for name in ("checkpoints", "checkpoints/100/base"):
      with pytest.raises(UserError, match="is inside of the source"):
        check_apart(tmp_path / "run", tmp_path / "run" / name)


class TestReplaced:
  @pytest.mark.parametrize("to", ["jax", "diffusers", "original"])
  def test_what_was_written(self, lora, tmp_path, to):
    """A LoRA folder replaces a LoRA folder, and an export an export."""
    source = lora
    if to != "jax":
      convert_any(str(WAN), str(source := tmp_path / "mine" / "base"))
    for _ in range(2):
      convert_any(str(source), str(tmp_path / "out"), to=to, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]

  def test_other_contents(self, lora, tmp_path):
    convert_any(str(lora), str(tmp_path / "out"))
    (tmp_path / "out" / "notes.txt").write_text("keep")
    assert_refused(lora, tmp_path / "out", r"out contains notes\.txt: --force replaces only empty folders and what")
    assert (tmp_path / "out" / "notes.txt").exists() and is_lora_folder(tmp_path / "out")
    (tmp_path / "tokens" / "tokenizer").mkdir(parents=True)
    assert_refused(lora, tmp_path / "tokens", "tokens contains tokenizer: --force")
    convert_any(str(WAN), str(base := tmp_path / "base"))
    assert_refused(base, tmp_path / "tokens", "tokens contains tokenizer: --force", to="diffusers")

  def test_workdir_of_a_run(self, lora, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
      (tmp_path / "run" / name).write_text("{}")
    assert_refused(lora, tmp_path / "run", r"run contains checkpoints, metrics\.jsonl: --force")

  def test_empty_folder(self, lora, tmp_path):
    (tmp_path / "out").mkdir()
    convert_any(str(lora), str(tmp_path / "out"), force=True)
    assert is_lora_folder(tmp_path / "out")

  def test_what_macos_adds(self, lora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("")
    convert_any(str(lora), str(tmp_path / "out"), force=True)
    assert is_lora_folder(tmp_path / "out")

  def test_files_and_folders(self, lora, tmp_path):
    """Neither replaces the other, and messages name the path as it was given."""
    (tmp_path / "folder.safetensors").mkdir()
    assert_refused(
      lora,
      tmp_path / "folder.safetensors",
      r"/folder\.safetensors is a folder, and a file is to be written",
      to="musubi",
    )
    (tmp_path / "mine.txt").write_text("keep")
    assert_refused(lora, tmp_path / "mine.txt", r"/mine\.txt is a file, and a folder is to be written")
    assert_refused(lora, tmp_path / "lo.bin", r"must be named \*\.safetensors, got .*/lo\.bin", to="comfyui")
    write_lora(tmp_path / "old.safetensors", small_lora(alpha=3.0), "comfyui")
    convert_any(str(lora), str(tmp_path / "old.safetensors"), to="comfyui", force=True)
    assert read_lora(tmp_path / "old.safetensors").alphas == (2.0,)

  def test_bucket(self, tmp_path):
    """A killed conversion to a bucket has left a part of a checkpoint at the destination itself."""
    bucket = open_bucket("replaced")
    (bucket / "part" / "vae").mkdir(parents=True)
    with atomic_folder(bucket / "part", needed=0, force=True) as folder:
      (folder / "checkpoint.json").write_text("{}")
    (bucket / "part" / "notes.txt").write_text("keep")
    with (
      pytest.raises(UserError, match=r"part contains notes\.txt"),
      atomic_folder(bucket / "part", needed=0, force=True),
    ):
      pass


class TestSidecar:
  """A .ckpt has its metadata and checksum in a file beside it, under its own name."""

  @pytest.fixture
  def lora(self, tmp_path):
    pytest.importorskip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
    usage = Usage.from_config(
      RunConfig(model=ModelConfig(attention=Attention.CONTEXT_CAUSAL), flow=FlowConfig(shift=3.5))
    )
    metadata = {SOFTWARE: SOFTWARE_NAME, **usage.to_metadata(), "step": "7"}
    write_lora(tmp_path / "source.safetensors", dataclasses.replace(small_lora(), metadata=metadata), "comfyui")
    return tmp_path / "source.safetensors"

  def test_equals_a_safetensors_file(self, lora, tmp_path):
    names = ["lo.ckpt", "lo.safetensors"]
    for name in names:
      convert_any(str(lora), str(tmp_path / "out" / name), to="univid")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lo.ckpt", "lo.ckpt.json", "lo.safetensors"]
    ours, theirs = (read_lora(tmp_path / "out" / name) for name in names)
    assert ours.usage is not None and ours.usage == theirs.usage == read_lora(lora).usage
    assert ours.metadata["step"] == "7" and ours.usage.attention == Attention.CONTEXT_CAUSAL
    for tensor, change in ours.changes.items():
      assert all(np.array_equal(part, theirs.changes[tensor].parts()[name]) for name, part in change.parts().items())
    assert check_seal(tmp_path / "out" / "lo.ckpt.json", tmp_path / "out" / "lo.ckpt") is True
    [found] = verify(tmp_path / "out", write=False)
    assert found.num_files == 2 and not found.damaged

  def test_existing_files(self, lora, tmp_path):
    """Both are replaced together, and neither without --force."""
    (tmp_path / "lo.ckpt.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"lo\.ckpt\.json already exists; --force replaces it"):
      convert_any(str(lora), str(tmp_path / "lo.ckpt"), to="univid")
    for _ in range(2):
      convert_any(str(lora), str(tmp_path / "lo.ckpt"), to="univid", force=True)
    assert read_lora(tmp_path / "lo.ckpt").usage

  def test_leftovers(self, lora, tmp_path):
    """What a killed conversion has left of a sidecar is removed; an error leaves nothing."""
    left_by_killed(tmp_path / "lo.ckpt.json").write_text("half")
    convert_any(str(lora), str(tmp_path / "lo.ckpt"), to="univid")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lo.ckpt", "lo.ckpt.json", "source.safetensors"]

  def test_without_torch(self, lora, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"/lo\.ckpt is a PyTorch file and needs PyTorch"):
      convert_any(str(lora), str(tmp_path / "lo.ckpt"), to="univid")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
