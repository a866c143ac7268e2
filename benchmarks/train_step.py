"""A training step, or a forward pass, against diffusers' transformer with PEFT's LoRA and SDPA at the same shapes.

  python -m benchmarks.train_step [--against=torch|torch_compile] [--variant=wan2.1-t2v-1.3b] [--layers=4] [--frames=1]
      [--height=512 --width=512] [--rows=1] [--dtype=float32] [--mode=train|forward] [--remat=full] [--pairs=5]

One sentence of four clips per row, a prompt of 512 tokens, LoRA of rank 16 on all Linears of attention and
feed-forward, blocks recomputed in the backward pass, AdamW, loss on the last clip; random weights. TFLOP/s and MFU
count the model's own work, with a last block that computes only the targets (`models.flops.step_flops`); HFU counts
recomputation as well.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.steps import LORA_RANK, ModelFlags, diffusers_options, make_row_program, make_sentence_row
from benchmarks.timing import Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.core.errors import UserError
from univid_jax.core.options import AttentionBackend, RematPolicy
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
MODEL = ModelFlags(FLAGS, height=512, width=512)
ROWS = FLAGS.integer("rows", 1, "Rows of a batch.", lower_bound=1)
MODE = FLAGS.choice("mode", "train", ["train", "forward"], "A step, or a forward pass alone.")
REMAT = FLAGS.strings("remat", ["full"], f"Remat policies of univid_jax: {', '.join(RematPolicy)}; several race.")
BACKEND = FLAGS.choice("attention_backend", "auto", list(AttentionBackend), "Of univid_jax.")
RACE = RaceFlags(FLAGS)

PROMPT_TOKENS = 512


def build_jax(
  *, shape: DiTConfig, frames: int, height: int, width: int, rows: int, dtype: str, mode: str, backend: str, remat: str
) -> Callable[[], object]:
  import jax
  import numpy as np

  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.parallel.sharding import shard_batch

  row = make_sentence_row(
    shape, frames=frames, height=height, width=width, prompt_tokens=PROMPT_TOKENS, with_targets=mode == "train"
  )
  row = dataclasses.replace(row, key_intervals=None, text_intervals=None, modulation_ids=None)
  row = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), row)
  run = make_row_program(shape, dtype=dtype, mode=mode, backend=backend, remat=remat)
  row = shard_batch(row, make_mesh({}, devices=jax.devices()[:1]))  # on the device, like the peer's rows
  return lambda: run(row)


def build_torch(
  *, options: dict[str, Any], frames: int, height: int, width: int, rows: int, dtype: str, mode: str, compiled: bool
) -> Callable[[], object]:
  import diffusers
  import peft
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  kind = diffusers.WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  with torch.device(device):
    model = kind(**options).to(getattr(torch, dtype))
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.data = parameter.data.float()
    channels = options["in_channels"]
    stride = find_autoencoder(channels).spatial_stride
    clean = torch.ones(rows, channels, 4 * frames, height // stride, width // stride, dtype=getattr(torch, dtype))
    text = torch.ones(rows, PROMPT_TOKENS, options["text_dim"], dtype=getattr(torch, dtype))
  if mode == "train":
    model.enable_gradient_checkpointing()
    model.train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
  run_model = torch.compile(model) if compiled else model
  cast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  def forward() -> None:
    with torch.no_grad(), cast:
      run_model(clean, torch.full((rows,), 500.0, device=device), text, return_dict=False)
    wait()

  def step() -> None:
    target = clean[:, :, -frames:]
    noise, sigma = torch.randn_like(target), torch.rand(rows, device=device)
    level = sigma.view(-1, 1, 1, 1, 1).to(target.dtype)
    noised = torch.cat([clean[:, :, :-frames], torch.lerp(target, noise, level)], dim=2)
    with cast:
      predicted = run_model(noised, 1000 * sigma, text, return_dict=False)[0][:, :, -frames:]
      loss = torch.nn.functional.mse_loss(predicted.float(), (noise - target).float())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    wait()

  return forward if mode == "forward" else step


@dataclasses.dataclass(frozen=True)
class Work:
  """Operations of a batch: the model's own, and with recomputation of everything (0 unless all programs do that)."""

  model: float
  hardware: float

  @classmethod
  def for_shape(cls, shape: DiTConfig, tokens: int, *, rows: int, remat: Sequence[str] | None) -> "Work":
    """Counts the operations for policies that race, or for a forward pass."""
    from univid_jax.models.flops import forward_flops, step_flops

    counts = dict(
      tokens=float(rows * tokens),
      text_tokens=float(rows * PROMPT_TOKENS),
      attended=float(rows * tokens**2),
      attended_text=float(rows * tokens * PROMPT_TOKENS),
    )
    if remat is None:
      return cls(forward_flops(shape, **counts), 0.0)

    def count_step(*, recompute: bool) -> float:
      return step_flops(shape, lora_rank=LORA_RANK, recompute=recompute, targets=rows * tokens / 4, **counts)

    recomputes_all = set(remat) <= {RematPolicy.FULL, RematPolicy.OFFLOAD}
    return cls(count_step(recompute=False), count_step(recompute=True) if recomputes_all else 0.0)


@app.command(FLAGS)
def main() -> None:
  if unknown := set(REMAT.value) - set(RematPolicy):
    raise UserError(f"--remat must be one or more of {', '.join(RematPolicy)}, got {unknown.pop()!r}")
  shape = MODEL.shape
  shared = dict(
    frames=MODEL.frames.value,
    height=MODEL.height.value,
    width=MODEL.width.value,
    rows=ROWS.value,
    dtype=RACE.dtype.value,
    mode=MODE.value,
  )
  side = 2 * find_autoencoder(shape.out_dim).spatial_stride
  tokens = 4 * MODEL.frames.value * (MODEL.height.value // side) * (MODEL.width.value // side)
  work = Work.for_shape(shape, tokens, rows=ROWS.value, remat=REMAT.value if MODE.value == "train" else None)
  ours = {**shared, "shape": shape, "backend": BACKEND.value}
  programs = {
    f"univid_jax, {remat}" if i else "univid_jax": Program(build_jax, {**ours, "remat": remat})
    for i, remat in enumerate(REMAT.value)
  }
  programs |= RACE.peers(build_torch, {**shared, "options": diffusers_options(shape)})
  print(
    f"{MODE.value}: {tokens:,} tokens per sentence, {shape.num_layers} layers, {work.model / 1e12:.2f} TFLOP"
    + (f", {work.hardware / 1e12:.2f} with recomputation" if work.hardware else "")
  )
  figures = RACE.run(programs, flops=work.model, hardware_flops=work.hardware)
  setup = {"shape": dataclasses.asdict(shape), "tokens": tokens, "flops": work.model}
  RACE.write({**shared, **setup, **figures})


if __name__ == "__main__":
  sys.exit(main())
