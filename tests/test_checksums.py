"""Files that changed since they were written are noticed, by name, before they are used."""

import importlib
import logging
import shutil

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import GOLDENS, package_or_skip
from tests.stand_ins import open_bucket
from univid_jax.checkpoints.checksums import (
  CHECKSUMS_FILE,
  DamagedError,
  check_seal,
  find_damage,
  hash_file,
  verified,
  write_checksums,
)
from univid_jax.checkpoints.lora.folder import write_lora_folder
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import LoRALayer
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.cli.verification import Findings
from univid_jax.convert.commands import convert_any
from univid_jax.core.errors import UserError
from univid_jax.data.cache.entries import Cache
from univid_jax.inference.load import load_pipeline

SENTENCE = b"the quick brown fox"


def list_files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path, rng=None, *, place=None):
  """Flips a random bit, of the byte at a place if one is given; returns the former contents."""
  rng = rng or np.random.default_rng()
  before = path.read_bytes()
  place = int(rng.integers(len(before)) if place is None else place)
  path.write_bytes(before[:place] + bytes([before[place] ^ 1 << int(rng.integers(8))]) + before[place + 1 :])
  return before


def small_lora():
  rng = np.random.default_rng(0)
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 24), (24, 3)))
  return LoRAWeights({f"blocks.{block}.self_attn.q.weight": LoRALayer(down, up, 5.0) for block in (0, 2)}, "jax")


def run_verify(*arguments):
  return importlib.import_module("univid_jax.verify").main(["verify", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
  """Files in folders, one of them empty."""
  for name, contents in {"a": SENTENCE, "b/c": b"", "b/d e": bytes(1 << 19)}.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(contents)
  write_checksums(tmp_path)
  return tmp_path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A base of a transformer and an autoencoder."""
  package_or_skip("torch", reason="the autoencoder of the release is a PyTorch file; needs the extra `convert`")
  release, base = (tmp_path_factory.mktemp("base") / name for name in ("release", "base"))
  release.mkdir()
  for name in ("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"):
    shutil.copy(GOLDENS / "tiny_wan" / name, release)
  convert_any(str(release), str(base))
  return base


class TestFolders:
  def test_the_list_is_that_of_xxhsum(self, folder):
    *lines, last = (folder / CHECKSUMS_FILE).read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["a", "b/c", "b/d e"]
    assert last.startswith("# ") and last.endswith(" of the lines above")
    # Published for XXH3 (128 bits) of no data.
    assert lines[1].split()[0] == "99aa06d3014798d86001c324468d497f"

  def test_intact(self, folder):
    (folder / "unlisted").touch()
    assert find_damage(folder) == []
    with verified(folder):
      pass

  @pytest.mark.parametrize("name", ["a", "b/d e"])
  def test_damaged_cut_and_missing(self, folder, name):
    path, contents = folder / name, (folder / name).read_bytes()
    for change, what in (
      (lambda: flip_bit(path), "checksum differs"),
      (lambda: path.write_bytes(contents[:-1]), "checksum differs"),
      (lambda: path.write_bytes(contents + b"\0"), "checksum differs"),
      (path.unlink, "missing, but has a checksum"),
      (path.mkdir, "no checksum: Is a directory"),
    ):
      change()
      assert find_damage(folder) == [f"{name} ({what})"]
      assert find_damage(folder, lambda other: other != name) == []

  @settings(deadline=None)
  @given(data=st.data())
  def test_any_flipped_bit_of_the_list(self, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("list")
    (folder / "a").write_bytes(SENTENCE)
    write_checksums(folder)
    contents = bytearray((folder / CHECKSUMS_FILE).read_bytes())
    place = data.draw(st.integers(0, 8 * len(contents) - 1))
    contents[place // 8] ^= 1 << place % 8
    (folder / CHECKSUMS_FILE).write_bytes(contents)
    assert find_damage(folder) == [f"{CHECKSUMS_FILE} (its own checksum differs)"]
    shutil.rmtree(folder)

  def test_a_list_that_was_cut_off(self, folder):
    contents = (folder / CHECKSUMS_FILE).read_bytes()
    for length in (0, 40, len(contents) - 1):
      (folder / CHECKSUMS_FILE).write_bytes(contents[:length])
      assert find_damage(folder) == [f"{CHECKSUMS_FILE} (its own checksum differs)"]

  def test_damage_takes_the_place_of_the_error_that_it_causes(self, folder):
    with pytest.raises(KeyError), verified(folder):
      raise KeyError
    flip_bit(folder / "a")
    with pytest.raises(DamagedError, match=r"is damaged: a \(checksum differs\)"), verified(folder):
      raise KeyError
    with verified(folder, enabled=False):
      pass

  def test_without_checksums(self, folder, caplog):
    (folder / CHECKSUMS_FILE).unlink()
    with caplog.at_level(logging.WARNING), verified(folder):
      pass
    assert f"to add them: python -m univid_jax.verify {folder} --write" in caplog.text

  def test_a_name_that_leads_elsewhere(self, folder):
    (folder / "../elsewhere").write_bytes(b"")
    from univid_jax.checkpoints.checksums import _last_line

    lines = f"{hash_file(folder / '../elsewhere')}  ../elsewhere\n".encode()
    (folder / CHECKSUMS_FILE).write_bytes(lines + _last_line(lines))
    with pytest.raises(UserError, match="must be a path inside"):
      find_damage(folder)


class TestBase:
  def test_every_file_of_every_component(self, converted):
    """load_pipeline verifies them all, also those that it does not load yet."""
    names = [str(path.relative_to(converted)) for path in list_files(converted) if path.name != CHECKSUMS_FILE]
    assert {name.split("/")[0] for name in names} == {"checkpoint.json", "transformer", "vae"}
    filled = [name for name in names if (converted / name).stat().st_size]
    contents = {name: flip_bit(converted / name) for name in filled}
    assert find_damage(converted) == [f"{name} (checksum differs)" for name in sorted(filled)]
    for name in filled:
      (converted / name).write_bytes(contents[name])
    assert find_damage(converted) == []

  @pytest.mark.parametrize("component", ["transformer", "vae", "checkpoint.json"])
  def test_load_pipeline(self, converted, component, tmp_path):
    files = [path for path in list_files(converted) if path.is_relative_to(converted / component)]
    path = max(files, key=lambda path: path.stat().st_size)
    contents = flip_bit(path)
    try:
      with pytest.raises(DamagedError, match=rf"{path.relative_to(converted)} \(checksum differs\)"):
        load_pipeline(str(converted))
      if component == "vae":
        load_pipeline(str(converted), verify_weights=False)
        with pytest.raises(DamagedError, match="checksum differs"):
          convert_any(str(converted), str(tmp_path / "out"), to="diffusers")
        assert not any(tmp_path.iterdir())
      path.unlink()
      with pytest.raises(DamagedError, match=rf"{path.relative_to(converted)} \(missing, but has a checksum\)"):
        load_pipeline(str(converted))
    finally:
      path.write_bytes(contents)

  def test_verify_adds_checksums(self, converted, caplog, capsys):
    (converted / CHECKSUMS_FILE).unlink()
    with caplog.at_level(logging.WARNING):
      load_pipeline(str(converted))
    assert f"python -m univid_jax.verify {converted} --write" in caplog.text
    assert run_verify(converted) == 1 and "no checksums; --write adds them" in capsys.readouterr().out
    assert run_verify(converted, "--write") == 0 and run_verify(converted) == 0
    caplog.clear()
    load_pipeline(str(converted))
    assert "checksums" not in caplog.text


class TestLoRA:
  @pytest.mark.parametrize(
    "to, name",
    [
      ("comfyui", "lora.safetensors"),
      ("diffusers", "lora.safetensors"),
      ("musubi", "lora.safetensors"),
      ("univid", "lora.SAFETENSORS"),
    ],
  )
  def test_a_file_holds_its_own_checksum(self, tmp_path, to, name):
    path = tmp_path / name
    write_lora(path, small_lora(), to)
    header = path.read_bytes().index(b"univid_checksum")
    assert check_seal(path) is True
    for place in [*range(header, header + 60), *np.random.default_rng().integers(path.stat().st_size, size=10)]:
      contents = flip_bit(path, place=place)
      with pytest.raises(UserError, match=name):
        read_lora(path)
      assert run_verify(path) == 1
      path.write_bytes(contents)
    assert len(read_lora(path).changes) == 2 and run_verify(path) == 0

  @pytest.mark.parametrize("name", ["lora.ckpt", "lora.CKPT"])
  def test_a_sidecar_holds_the_checksum_of_both(self, tmp_path, name):
    pytest.importorskip("torch")
    path, sidecar = tmp_path / name, tmp_path / f"{name}.json"
    write_lora(path, small_lora(), "univid")
    for changed in (path, sidecar):
      for _ in range(10):
        contents = flip_bit(changed)
        with pytest.raises(UserError, match=name):
          read_lora(path)
        changed.write_bytes(contents)
    assert len(read_lora(path).changes) == 2 and run_verify(tmp_path) == run_verify(path) == 0
    flip_bit(path)
    assert run_verify(path) == 1

  def test_the_message_names_the_checksum(self, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, small_lora(), "comfyui")
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DamagedError, match=r"lora\.safetensors \(checksum differs\)"):
      read_lora(path)
    read_lora(path, verify=False)

  def test_folder(self, tmp_path):
    write_lora_folder(tmp_path, small_lora())
    for path in list_files(tmp_path):
      contents = flip_bit(path)
      with pytest.raises(DamagedError, match=rf"{path.relative_to(tmp_path)} \(.*checksum differs\)"):
        read_lora(tmp_path)
      path.write_bytes(contents)
    assert len(read_lora(tmp_path).changes) == 2


class TestCommand:
  def test_whatever_is_in_a_folder(self, converted, tmp_path, capsys):
    """Exit codes, and the name of every damaged file."""
    shutil.copytree(converted, tmp_path / "base")
    cache = Cache(tmp_path / "cache" / "latents", "test")
    for number in range(3):
      cache.put(str(number), np.full(4, number))
    write_lora(tmp_path / "lora.safetensors", small_lora(), "comfyui")
    (tmp_path / "lora").mkdir()
    write_lora_folder(tmp_path / "lora", small_lora())
    (tmp_path / "note.txt").write_text("no checksum")
    assert run_verify(tmp_path) == 0 and "DAMAGED" not in capsys.readouterr().out
    chosen = [
      tmp_path / "lora.safetensors",
      cache.path("1"),
      next((tmp_path / "base" / "vae").rglob("0")),
      tmp_path / "lora" / CHECKSUMS_FILE,
    ]
    for path in chosen:
      contents = bytearray(path.read_bytes())
      contents[-1] ^= 1
      path.write_bytes(contents)
    assert run_verify(tmp_path) == 1
    out, error = capsys.readouterr()
    named = [line for line in out.splitlines() if line.startswith("DAMAGED ")]
    assert len(named) == 4 and all(any(str(path) in line for line in named) for path in chosen)
    assert "4 of " in error and error.endswith("files damaged\n")

  def test_loras_in_a_bucket(self, tmp_path, capsys):
    bucket = open_bucket("loras")
    for to in ("comfyui", "univid"):
      path = tmp_path / f"{to}.safetensors"
      write_lora(path, small_lora(), to)
      (bucket / path.name).write_bytes(path.read_bytes())
    assert run_verify(bucket) == 0 and "2 of 2 files are intact" in capsys.readouterr().out
    assert run_verify(bucket / "univid.safetensors") == 0
    intact = path.read_bytes()
    for place in (None, 2):  # the second byte of the header's length
      flip_bit(path, place=place)
      (bucket / path.name).write_bytes(path.read_bytes())
      path.write_bytes(intact)
      for target in (bucket, bucket / path.name):
        capsys.readouterr()
        assert run_verify(target) == 1 and f"DAMAGED {bucket}/univid.safetensors (checksum" in capsys.readouterr().out

  @pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.long)])
  def test_every_bit_of_a_lora_counts(self, tmp_path, bits):
    """By default one bit of each byte."""
    write_lora(path := tmp_path / "lora.safetensors", small_lora(), "comfyui")
    intact = path.read_bytes()
    for place in range(8 + int.from_bytes(intact[:8], "little") + 8):
      for bit in ((place + i) % 8 for i in range(bits)):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1 << bit]) + intact[place + 1 :])
        assert check_seal(path) is False, (place, bit)

  def test_nothing_to_verify(self, tmp_path, capsys):
    assert run_verify(tmp_path) == 1 and "nothing in" in capsys.readouterr().err
    assert run_verify(tmp_path / "absent") == 1 and "no such file or folder" in capsys.readouterr().err
    assert run_verify() == 2


@pytest.mark.parametrize("count, text", [(1, "1 of 1 file is intact"), (2, "2 of 2 files are intact")])
def test_what_was_found_is_said_of_one_file_too(count, text):
  assert str(Findings(path=epath.Path("here"), num_files=count)) == f"here: {text}"
