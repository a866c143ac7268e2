"""Damaged and malicious checkpoint files end in one line, before they cost memory or time."""

import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from tests.checkpoint_files import write_raw, write_safetensors
from tests.helpers import GOLDENS
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.convert.__main__ import main
from univid_jax.convert.sources import find_release
from univid_jax.core.errors import UserError

RELEASE = GOLDENS / "tiny_wan"
WEIGHTS = load_file(RELEASE / "diffusion_pytorch_model.safetensors")
CONFIG = json.loads((RELEASE / "config.json").read_text())


def entry(start, end, dtype="F32", shape=(2,)):
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
  "header, data, message",
  [
    (b"", b"", "not a complete safetensors file"),
    (b"{", b"", "not a complete safetensors file"),
    (b"\xff\xfe", b"", "not a complete safetensors file"),
    (b"[" * 100_000, b"", "not a complete safetensors file"),
    ({"a": 3}, b"", "not a complete safetensors file"),
    ({"a": entry(0, 8)}, b"1234", "not a complete safetensors file"),
    ({"a": entry(0, 8)}, b"12345678more", "not a complete safetensors file"),
    ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, "not a complete safetensors file"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, b"0" * 20, "not a complete safetensors file"),
    ({"a": entry(0, 8, shape=[2**40, 2**40])}, b"0" * 8, "not a complete safetensors file"),
    ({"a": entry(0, 8, shape=[-2])}, b"0" * 8, "not a complete safetensors file"),
    ({"a": entry(0, 8, dtype="F12")}, b"0" * 8, "not a complete safetensors file"),
    ({"a": entry(0, 8, dtype="C64", shape=[1])}, b"0" * 8, "a has the dtype C64, which is not supported"),
    (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), b"0" * 8, "the key 'a' appears twice"),
  ],
)
def test_safetensors_header(tmp_path, header, data, message):
  with pytest.raises(UserError, match=message):
    open_tensors(write_raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("size", [1 << 62, 1 << 40, 100_000_001])
def test_absurd_header_size(tmp_path, size):
  (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
  with pytest.raises(UserError, match="not a complete safetensors file"):
    open_tensors(tmp_path / "x.safetensors")


def test_file_that_shrinks(tmp_path):
  """Ends in an error; memory that is mapped to a file would end in a bus error."""
  (tmp_path / "x.safetensors").write_bytes(whole := save({"a": np.ones(10_000)}))
  tensors = open_tensors(tmp_path / "x.safetensors")
  (tmp_path / "x.safetensors").write_bytes(whole[:500])
  with pytest.raises(UserError, match="is not complete: it ends before byte"):
    tensors.read("a")


class TestShards:
  @pytest.fixture
  def write_index(self, tmp_path):
    (tmp_path / "release").mkdir()
    for number in (1, 2):
      (tmp_path / "release" / f"x-{number}.safetensors").write_bytes(
        save({f"t{number}": np.ones(2), "both": np.ones(2)})
      )
    (tmp_path / "outside.safetensors").write_bytes(save({"t1": np.ones(2)}))

    def write(weight_map):
      index = tmp_path / "release" / "model.safetensors.index.json"
      index.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
      return index

    return write

  @pytest.mark.parametrize(
    "weight_map, message",
    [
      ("[]", "must contain a JSON object, got list"),
      ("{", "is not valid JSON"),
      ("[" * 100_000, "is not valid JSON: it is nested too deeply"),
      ('{"weight_map": {"a": "x-1.safetensors", "a": "x-2.safetensors"}}', "the key 'a' appears twice"),
      ("{}", "is not an index of shards"),
      ({}, "is not an index of shards"),
      ({"t1": 3}, "is not an index of shards"),
      ({"t1": "../outside.safetensors"}, "index.json: '../outside.safetensors' must be a path inside"),
      ({"t1": "/etc/passwd"}, "'/etc/passwd' must be a path inside"),
      ({"t1": "x-1.txt"}, "names x-1.txt as a shard"),
      ({"t1": "x-1.safetensors", "t2": "x-3.safetensors"}, "are missing: x-3.safetensors"),
      ({"t1": "x-1.safetensors", "t2": "x-2.safetensors"}, "1 tensors are in several shards of .*, the first is both"),
      ({"t1": "x-1.safetensors", "t3": "x-1.safetensors"}, "disagree about the tensor both in x-1.safetensors"),
    ],
  )
  def test_wrong_index(self, write_index, weight_map, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
      open_tensors(write_index(weight_map))

  def test_missing_shards(self, tmp_path):
    for suffix in (".safetensors", ".bin"):
      (tmp_path / f"x-00001-of-00002{suffix}").write_bytes(b"")
      with pytest.raises(FileNotFoundError, match=rf"its index x{suffix}.index.json is missing"):
        find_release(tmp_path)
      with pytest.raises(UserError, match="is shard 1 of 2: pass the folder"):
        find_release(tmp_path / f"x-00001-of-00002{suffix}")
      (tmp_path / f"x-00001-of-00002{suffix}").unlink()
    (tmp_path / "x-00001-of-00003.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="is part 1 of 3: join the parts"):
      find_release(tmp_path)


class TestConfig:
  @pytest.fixture
  def folder(self, tmp_path):
    shutil.copy(RELEASE / "diffusion_pytorch_model.safetensors", tmp_path)
    return tmp_path

  @pytest.mark.parametrize(
    "values, message",
    [
      (b"[]", "must contain a JSON object, got list"),
      (b"\xff", "is not valid JSON"),
      ({"num_heads": 0}, "config.json has num_heads = 0, expected an integer from 1 to 100,000"),
      ({"num_heads": "4"}, "config.json has num_heads = '4', expected an integer"),
      ({"num_heads": 4.0}, "config.json has num_heads = 4.0, expected an integer"),
      ({"num_heads": True}, "config.json has num_heads = True, expected an integer"),
      ({"num_heads": 5}, "dim 96 does not split into 5 heads"),
      ({"text_len": 10**12}, "config.json has text_len = 1000000000000, expected an integer"),
      ({"eps": float("nan")}, "config.json has eps = nan, expected a positive number"),
      ({"eps": []}, r"config.json has eps = \[\], expected a positive number"),
      ({"patch_size": [1, 2]}, r"config.json has patch_size = \[1, 2\], expected three integers"),
      ({"model_type": 3}, "config.json has model_type = 3, expected a text"),
      ({"_class_name": "VaceWanModel"}, "VaceWanModel with model_type 't2v' is not supported"),
    ],
  )
  def test_wrong_values(self, folder, values, message):
    text = values if isinstance(values, bytes) else json.dumps({**CONFIG, **values}).encode()
    (folder / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
      find_release(folder)

  def test_null_and_unknown_values(self, folder):
    """As in diffusers' files."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "image_dim": None, "other": {"a": [1]}}))
    assert find_release(folder).sources[0].config.num_heads == CONFIG["num_heads"]


class TestGGUF:
  def header(self, *parts, tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)

  @staticmethod
  def text(value):
    return struct.pack("<Q", len(value)) + value

  def tensor(self, name, dims, kind=0, offset=0):
    return (
      self.text(name)
      + struct.pack("<I", len(dims))
      + struct.pack(f"<{len(dims)}Q", *dims)
      + struct.pack("<IQ", kind, offset)
    )

  def test_messages(self, tmp_path):
    key, huge = self.text(b"k"), 1 << 60
    for content, message in (
      (b"", "is not a GGUF file"),
      (b"GGML1234", "does not begin with GGUF"),
      (self.header(version=1), "version 1 is not supported"),
      (self.header(values=huge), "header does not end within the file"),
      (self.header(tensors=huge), "header does not end within the file"),
      (self.header(struct.pack("<Q", huge), values=1), "header does not end within the file"),
      (self.header(key, struct.pack("<IIQ", 9, 0, huge), values=1), "header does not end within the file"),
      (self.header(key, struct.pack("<IIQ", 9, 8, huge), values=1), "header does not end within the file"),
      (self.header(key, struct.pack("<IIQ", 9, 9, 1), values=1), "array of the unknown type 9"),
      (self.header(key, struct.pack("<I", 77), values=1), "value of the unknown type 77"),
      (self.header(*(key, struct.pack("<IB", 0, 1)) * 2, values=2), "header has k twice"),
      (self.header(*(self.tensor(b"t", [4]),) * 2, b"\0" * 64, tensors=2), "two tensors of the name t"),
      (self.header(self.tensor(b"t", [4], kind=99), tensors=1), "t has the unknown type 99"),
      (self.header(self.tensor(b"t", [4], kind=15), tensors=1), "type Q8_K, which the package gguf cannot dequantise"),
      (self.header(self.tensor(b"t", [7], kind=8), tensors=1), "does not divide into the blocks of 32 of Q8_0"),
      (self.header(self.tensor(b"t", []), tensors=1), "does not divide into the blocks"),
      (self.header(self.tensor(b"t", [huge, huge]), tensors=1), "t ends after the file"),
      (self.header(self.tensor(b"t", [4], offset=huge), tensors=1), "t ends after the file"),
      (self.header(self.tensor(b"t", [4]), self.tensor(b"u", [4], offset=8), b"\0" * 96, tensors=2), "u overlaps t"),
      (self.header(self.text(b"general.alignment"), struct.pack("<II", 4, 3), values=1), "alignment is 3"),
    ):
      (tmp_path / "x.gguf").write_bytes(content)
      with pytest.raises(UserError, match=message):
        open_tensors(tmp_path / "x.gguf")


class TestPyTorch:
  @pytest.fixture(autouse=True)
  def torch(self):
    return pytest.importorskip("torch", reason="needs the extra `convert`")

  def test_claimed_shapes(self, torch, tmp_path):
    """A tensor may be a view of fewer numbers, and be without limit when it is copied."""
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="a has less data than its shape"):
      open_tensors(tmp_path / "x.pth")
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="or is sparse"):
      open_tensors(tmp_path / "x.pth")

  def test_compressed(self, torch, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    with (
      zipfile.ZipFile(tmp_path / "a.pth") as source,
      zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
      for name in source.namelist():
        target.writestr(name, source.read(name))
    with pytest.raises(UserError, match="is a compressed archive, which PyTorch never writes"):
      open_tensors(tmp_path / "b.pth")

  @pytest.mark.parametrize("content", [{}, {"a": 3}, {3: 4}, [1], {"state_dict": {}}])
  def test_other_contents(self, torch, tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="named tensors"):
      open_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"blocks.999999999.ffn.0.weight": np.ones(2, np.float32)}, "the number of a block is 999999999"),
    ({"blocks.99999999999999999999.ffn.0.weight": np.ones(2, np.float32)}, "not used: blocks.99999999999999999999"),
    ({"patch_embedding.weight": np.ones((3, 3), np.float32)}, r"patch_embedding.weight is \(3, 3\), expected 5 dims"),
    ({"blocks.0.ffn.0.weight": np.ones(3, np.float32)}, r"blocks.0.ffn.0.weight is \(3,\), expected a matrix"),
    ({"blocks.0.ffn.0.bias": np.ones(0, np.float32)}, r"blocks.0.ffn.0.bias is empty: its shape is \(0,\)"),
  ],
)
def test_unusual_tensors(tmp_path, capsys, change, message):
  """The command prints one line."""
  shutil.copy(RELEASE / "config.json", tmp_path)
  file = write_safetensors(tmp_path / "wan.safetensors", {**WEIGHTS, **change})
  assert main(["convert", str(file), str(tmp_path / "target")]) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith(f"error: {file}: ") and message.replace("\\", "") in error
  assert not (tmp_path / "target").exists()
