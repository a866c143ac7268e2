"""The benchmarks that `benchmarks.gpu` runs, most valuable first."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

DIFFUSERS = ("torch", "diffusers", "peft")


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A benchmark to run.

  Attributes:
    name: name in --only and in the figures.
    title: title in the rows.
    seconds: estimated seconds of the whole process on an H100.
    module: module of the package benchmarks.
    arguments: arguments of the module.
    tiny: arguments that replace those of the same flag, or are added, with --tiny.
    peer: arguments that add the peer.
    peer_needs: packages that the peer needs.
    needs: packages without which it is skipped.
    races: whether it takes the flags of a race (`timing.RaceFlags`).
  """

  name: str
  title: str
  seconds: float
  module: str
  arguments: str
  tiny: str
  peer: str = ""
  peer_needs: Sequence[str] = ()
  needs: Sequence[str] = ()
  races: bool = True

  def command(self, *, tiny: bool, with_peer: bool, patience: float, out: Path) -> list[str]:
    values: dict[str, str] = {}
    for argument in shlex.split(f"{self.arguments} {self.peer if with_peer else ''} {self.tiny if tiny else ''}"):
      values[argument.partition("=")[0]] = argument
    if not with_peer:
      values.pop("--against", None)
    if self.races:
      values |= {"--at_once": "--at_once", "--patience": f"--patience={max(int(patience), 1)}"}
    return [sys.executable, "-m", f"benchmarks.{self.module}", *values.values(), f"--out={out}"]


SENTENCE = "--frames=5 --height=480 --width=832"  # context I: four clips of 17 frames, 31,200 tokens
SMALL = "--frames=1 --height=32 --width=32 --pairs=2"
BENCHMARKS = (
  Benchmark(
    "ceiling",
    "matrix product, 8192 x 8192",
    25,
    "matmul",
    "--dtype=bfloat16",
    "--size=256 --repeats=2 --pairs=2",
    "--against=torch",
    ("torch",),
  ),
  Benchmark(
    "train",
    "LoRA step, 8 blocks",
    110,
    "train_step",
    f"{SENTENCE} --layers=8 --dtype=bfloat16 --remat=full,attention --pairs=5",
    f"{SMALL} --dim=128 --layers=2 --against=torch",
    "--against=torch,torch_compile",
    DIFFUSERS,
  ),
  Benchmark(
    "attention",
    "attention and gradient",
    30,
    "attention",
    "--tokens=31200 --dtype=bfloat16 --mode=gradient --backend=auto,xla --kernels=default,flash_attention,"
    "cudnn_attention --pairs=5",
    "--tokens=256 --kernels=default,math --pairs=2",
    "--against=torch",
    ("torch",),
  ),
  Benchmark(
    "precision",
    "forward pass, 4 blocks, error",
    50,
    "precision",
    "--layers=4 --height=480 --width=832",
    "--layers=2 --dim=128 --height=32 --width=32",
    "--against=torch",
    DIFFUSERS,
    races=False,
  ),
  Benchmark(
    "train_all",
    "LoRA step, 30 blocks",
    70,
    "train_step",
    f"{SENTENCE} --layers=0 --dtype=bfloat16 --remat=full,attention --pairs=3",
    f"{SMALL} --dim=128 --layers=3",
  ),
  Benchmark(
    "cross_attention",
    "cross-attention and gradient",
    20,
    "attention",
    "--tokens=31200 --keys=512 --dtype=bfloat16 --mode=gradient --pairs=5",
    "--tokens=256 --pairs=2",
    "--against=torch",
    ("torch",),
  ),
  Benchmark(
    "sample",
    "4 denoising steps, 8 blocks",
    60,
    "sample",
    f"--variant=wan2.1-t2v-1.3b {SENTENCE} --layers=8 --steps=4 --dtype=bfloat16 --full --pairs=3",
    f"{SMALL} --variant= --dim=64 --layers=2 --steps=2",
    "--against=torch",
    DIFFUSERS,
  ),
  Benchmark(
    "attention_forward",
    "attention, forward",
    30,
    "attention",
    "--tokens=31200 --dtype=bfloat16 --mode=forward --backend=auto,xla --kernels=default,flash_attention,"
    "cudnn_attention --pairs=5",
    "--tokens=256 --kernels=default,math --pairs=2",
    "--against=torch",
    ("torch",),
  ),
  *(
    Benchmark(
      f"{mode}_{dtype}",
      f"autoencoder, {mode} 17 frames of 480 x 832, {dtype}",
      70,
      "vae",
      f"--mode={mode} --dtype={dtype} --pairs=3",
      "--frames=1 --height=16 --width=16 --pairs=1",
      "--against=torch",
      DIFFUSERS[:2],
    )
    for dtype in ("bfloat16", "float32")
    for mode in ("encode", "decode")
  ),
  Benchmark("default_run", "default run", 60, "default_run", "--steps=400", "--steps=20", races=False),
)
