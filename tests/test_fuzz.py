"""Damaged files end in one clear line: no other exception, no hang, bounded memory, nothing written elsewhere.

python -m pytest tests/test_fuzz.py -m slow     # ten minutes in all
"""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.checkpoint_files import quantize_gguf, random_float8, write_gguf, write_safetensors
from tests.clip_files import FORM, draw_options, write_image, write_table, write_video
from tests.helpers import GOLDENS
from tests.mutations import damaged_bytes, damaged_json_file, damaged_safetensors, dump
from univid_jax.checkpoints.lora.folder import write_lora_folder
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.run import RunRecord, read_run, write_run
from univid_jax.config.presets import tiny
from univid_jax.convert.sources import find_release
from univid_jax.core.errors import UserError
from univid_jax.data.fingerprint import read_fingerprint
from univid_jax.data.sources.readers.arc import open_arc
from univid_jax.data.sources.readers.jsonl import open_manifest
from univid_jax.data.sources.readers.metadata_csv import open_metadata

CASES = Path(__file__).parent / "cases" / "lora"

SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))
MAX_SECONDS_PER_FILE = 20
MAX_MEGABYTES = 300


class Target(NamedTuple):
  """A reader to fuzz.

  Attributes:
    name: of the file.
    prepare: writes a valid file and what it needs into a folder.
    damage: given the valid file, a strategy for damaged ones.
    read: reads the file.
  """

  name: str
  prepare: Callable[[Path], object]
  damage: Callable[[bytes], st.SearchStrategy[bytes]]
  read: Callable[[Path], object]


def write_metadata_csv(folder: Path) -> None:
  write_video(folder / "a.mp4", 24)
  write_table(folder, [("a.mp4", 'a "text", with commas'), ("b.mp4", "ü")])


def write_manifest(folder: Path) -> None:
  write_image(folder / "a.png")
  clips = [{"path": "a.png", "role": role, "num_frames": 1, "start": 0} for role in ("context", "target")]
  (folder / "m.jsonl").write_bytes(dump({"clips": clips, "prompt": "x", "task": "y"}))


def write_arc_task(folder: Path) -> None:
  pairs = [{"input": [[0, 1], [2, 3]], "output": [[i]]} for i in range(3)]
  (folder / "a.json").write_bytes(dump({"train": pairs[:2], "test": pairs[2:]}))


def write_checkpoint_info(folder: Path) -> None:
  shutil.copy(Path(__file__).parent / "goldens" / "checkpoint.json", folder)


def write_fingerprint(folder: Path) -> None:
  (folder / "data.json").write_bytes(dump({"pairs": {"num_records": 1, "checksum": "x", "records": {"a": "b"}}}))


def write_config(folder: Path) -> None:
  write_run(folder, RunRecord(tiny(), ("",), "0"))


def write_lora(case: str) -> Callable[[Path], object]:
  return lambda folder: shutil.copy(CASES / f"{case}.safetensors", folder / "lora.safetensors")


def write_adapter(folder: Path) -> None:
  shutil.copytree(CASES / "peft_folder_patterns", folder, dirs_exist_ok=True)


def write_own_lora(folder: Path) -> None:
  shutil.rmtree(folder / "lora", ignore_errors=True)
  write_lora_folder(folder, read_lora(CASES / "dora.safetensors"))


def write_weights(folder: Path) -> None:
  """Writes a few tensors of a transformer in every form that a header can describe."""
  layer, random = "blocks.0.self_attn.q", np.random.default_rng(0)
  text = np.frombuffer(dump({"format": "float8_e4m3fn"}), np.uint8)
  tensors = {
    f"{layer}.weight": random_float8((4, 8), "float8_e4m3fn", random),
    f"{layer}.weight_scale": np.ones((4, 1), np.float32),
    f"{layer}.input_scale": np.ones(1, np.float32),
    f"{layer}.comfy_quant": text,
    "patch_embedding.weight": np.ones((4, 16, 1, 2, 2), np.float16),
    "head.head.weight": np.ones((64, 4), np.float32),
  }
  metadata = {"_quantization_metadata": dump({"layers": {layer: {"format": "float8_e4m3fn"}}}).decode()}
  write_safetensors(folder / "wan.safetensors", tensors, metadata)


def write_gguf_weights(folder: Path) -> None:
  tensors = {"blocks.0.self_attn.q.weight": np.ones((2, 64)), "patch_embedding.weight": np.ones((4, 16, 1, 2, 2))}
  quantized = quantize_gguf(tensors, {"blocks.0.self_attn.q.weight": "Q4_0"}, np.random.default_rng(0))
  write_gguf(folder / "wan.gguf", quantized, {"a": ["b", "c"], "d": [1.0], "general.alignment": 32})


def write_shards(folder: Path) -> None:
  for name in ("a", "b"):
    write_safetensors(folder / f"{name}.safetensors", {name: np.ones(3, np.float32)})
  (folder / "x.safetensors.index.json").write_bytes(dump({"weight_map": {x: f"{x}.safetensors" for x in "ab"}}))


def write_release(folder: Path) -> None:
  for name in ("config.json", "diffusion_pytorch_model.safetensors"):
    shutil.copy(GOLDENS / "tiny_wan" / name, folder)


def read_weights(path: Path) -> None:
  for source in find_release(path).sources:
    for name in source.tensors.infos:
      source.tensors.read(name)


TARGETS = (
  *(
    Target("lora.safetensors", write_lora(case), damaged_safetensors, read_lora)
    for case in ("conv_patch_embedding", "dora", "lokr", "loha", "musubi_bf16_alpha")
  ),
  Target("adapter_config.json", write_adapter, damaged_json_file, lambda path: read_lora(path.parent)),
  Target("lora.json", write_own_lora, damaged_json_file, lambda path: read_lora(path.parent)),
  Target(
    "metadata.csv", write_metadata_csv, damaged_bytes, lambda path: open_metadata(str(path), FORM, draw_options())
  ),
  Target("m.jsonl", write_manifest, damaged_json_file, lambda path: open_manifest(str(path), FORM, draw_options())),
  Target("a.json", write_arc_task, damaged_json_file, lambda path: open_arc(str(path.parent), tiny())),
  Target("config.json", write_config, damaged_json_file, lambda path: read_run(path.parent)),
  Target("data.json", write_fingerprint, damaged_json_file, lambda path: read_fingerprint(path.parent)),
  Target("wan.safetensors", write_weights, damaged_safetensors, read_weights),
  Target("wan.gguf", write_gguf_weights, damaged_bytes, read_weights),
  Target("x.safetensors.index.json", write_shards, damaged_json_file, read_weights),
  Target("config.json", write_release, damaged_json_file, lambda path: find_release(path.parent)),
)


def fuzz(target: Target, folder: Path, *, max_examples: int, seed: int) -> None:
  """Reads up to `max_examples` damaged files."""
  inside = folder / "inside" / "deep"
  inside.mkdir(parents=True, exist_ok=True)
  target.prepare(inside)
  path = inside / target.name
  original = path.read_bytes()
  expected = sorted(folder.rglob("*"))

  @hypothesis.settings(
    max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
  )
  @hypothesis.seed(seed)
  @hypothesis.given(target.damage(original))
  def check(data: bytes) -> None:
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(MAX_SECONDS_PER_FILE)
    try:
      target.read(path)
    except (UserError, OSError) as error:
      assert str(error)
    finally:
      signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MEGABYTES * 1024
    assert sorted(folder.rglob("*")) == expected

  check()


@pytest.fixture(autouse=True)
def alarm():
  def stop(*_):
    raise AssertionError("the file is still being read")

  previous = signal.signal(signal.SIGALRM, stop)
  yield
  signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files(tmp_path: Path, target: Target):
  fuzz(target, tmp_path, max_examples=60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_for_long(tmp_path: Path, target: Target):
  end, seed = time.monotonic() + SECONDS / len(TARGETS), 1
  while time.monotonic() < end:
    fuzz(target, tmp_path, max_examples=300, seed=seed)
    seed += 1
  print(f"{target.name}: {seed - 1} seeds of 300 examples")
