"""A training step, or a forward pass, beside PyTorch's: diffusers' transformer with PEFT's LoRA and SDPA, the same shapes.

  python -m benchmarks.train_step [--against=torch|torch_compile] [--variant=wan2.1-t2v-1.3b] [--layers=4] [--frames=1]
      [--height=512 --width=512] [--dtype=float32] [--mode=train|forward] [--remat=full] [--pairs=5]

One sentence of four clips, a prompt of 512 tokens, LoRA of rank 16 on all Linears of attention and feed-forward, blocks
recomputed in the backward pass, AdamW, loss on the last clip; random weights. TFLOP/s and MFU count the model's own work, with a
last block that computes the targets' tokens alone (`performance.step_flops`); HFU counts recomputation too.
"""

from absl import flags

from univid_jax import cli

VARIANT = flags.DEFINE_string("variant", "wan2.1-t2v-1.3b", "A name of models.dit.PRESETS.")
LAYERS = flags.DEFINE_integer("layers", 4, "Blocks; 0 for all.")
FRAMES = flags.DEFINE_integer("frames", 1, "Latent frames of a clip.", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", 512, "In pixels.")
WIDTH = flags.DEFINE_integer("width", 512, "In pixels.")
ROWS = flags.DEFINE_integer("rows", 1, "Sentences of a batch.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of weights and products; adapters are float32.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "forward"], "A step, or a forward pass alone.")
REMAT = flags.DEFINE_list("remat", ["full"], "What univid_jax recomputes: none, dots, attention or full; several race.")
BACKEND = flags.DEFINE_string("attention_backend", "auto", "Of univid_jax.")
AGAINST = flags.DEFINE_list("against", [], "Peers: torch (eager), torch_compile.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

PROMPT_TOKENS = 512
RANK = 16


def jax_side(shape, frames, height, width, rows, dtype, mode, backend, remat):
  import dataclasses

  import jax
  import numpy as np

  from benchmarks.steps import row_program
  from univid_jax.data.packing import RowShape, pack, sentence_features
  from univid_jax.types import Sentence, reference_roles

  clips = tuple(np.ones((frames, height // 8, width // 8, 16), np.float32) for _ in range(4))
  features = sentence_features(Sentence(clips=clips, roles=reference_roles(4)), patch_size=(1, 2, 2), text_len=PROMPT_TOKENS,
                               prompt_embedding=np.ones((PROMPT_TOKENS, shape.text_dim), np.float32))
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_text_tokens=PROMPT_TOKENS, num_slots=1,
                                  num_targets=len(features["targets"]) if mode == "train" else None))
  row = dataclasses.replace(row, key_intervals=None, text_intervals=None, modulation_ids=None)
  row = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), row)
  run = row_program(shape, dtype=dtype, mode=mode, backend=backend, remat=remat)
  return lambda: run(row)


def torch_side(options, frames, height, width, rows, dtype, mode, compiled):
  import diffusers
  import peft
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  with torch.device(device):
    model = diffusers.WanTransformer3DModel(**options).to(getattr(torch, dtype))
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.data = parameter.data.float()
    clean = torch.ones(rows, 16, 4 * frames, height // 8, width // 8, dtype=getattr(torch, dtype))
    text = torch.ones(rows, PROMPT_TOKENS, options["text_dim"], dtype=getattr(torch, dtype))
  if mode == "train":
    model.enable_gradient_checkpointing()
    model.train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
  run_model = torch.compile(model) if compiled else model
  cast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
  done = torch.cuda.synchronize if device == "cuda" else lambda: None

  def forward():
    with torch.no_grad(), cast:
      run_model(clean, torch.full((rows,), 500.0, device=device), text, return_dict=False)
    done()

  def step():
    target = clean[:, :, -frames:]
    noise, sigma = torch.randn_like(target), torch.rand(rows, device=device)
    noised = torch.cat([clean[:, :, :-frames], torch.lerp(target, noise, sigma.view(-1, 1, 1, 1, 1).to(target.dtype))], dim=2)
    with cast:
      predicted = run_model(noised, 1000 * sigma, text, return_dict=False)[0][:, :, -frames:]
      loss = torch.nn.functional.mse_loss(predicted.float(), (noise - target).float())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    done()
  return forward if mode == "forward" else step


def main() -> None:
  import dataclasses

  from benchmarks.steps import diffusers_options
  from benchmarks.timing import peers, print_ratios, race, write_json
  from univid_jax.models.dit import PRESETS, REMAT_POLICIES
  from univid_jax.performance import forward_flops, step_flops

  if unknown := set(REMAT.value) - set(REMAT_POLICIES):
    raise cli.UserError(f"--remat is one or more of {', '.join(REMAT_POLICIES)}, got {unknown.pop()!r}")
  shape = PRESETS[VARIANT.value]
  shape = dataclasses.replace(shape, num_layers=LAYERS.value or shape.num_layers)
  shared = dict(frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value, rows=ROWS.value, dtype=DTYPE.value, mode=MODE.value)
  length = 4 * FRAMES.value * (HEIGHT.value // 16) * (WIDTH.value // 16)
  counts = dict(tokens=length, text_tokens=PROMPT_TOKENS, attended=length**2, attended_text=length * PROMPT_TOKENS)
  if MODE.value == "train":
    counts["targets"] = length // 4
  counts = {name: ROWS.value * count for name, count in counts.items()}
  training = MODE.value == "train"
  flops = step_flops(shape, lora_rank=RANK, **counts) if training else forward_flops(shape, **counts)
  recomputes_all = training and REMAT.value == ["full"]
  with_recomputation = step_flops(shape, lora_rank=RANK, recompute=True, **counts) if recomputes_all else 0.0
  ours = {**shared, "shape": shape, "backend": BACKEND.value}
  sides = {f"univid_jax, {remat}" if i else "univid_jax": (jax_side, {**ours, "remat": remat})
           for i, remat in enumerate(REMAT.value)}
  sides |= peers(AGAINST.value, torch_side, {**shared, "options": diffusers_options(shape)})
  print(f"{MODE.value}: {length:,} tokens a sentence, {shape.num_layers} layers, {flops / 1e12:.2f} TFLOP"
        + (f", {with_recomputation / 1e12:.2f} with recomputation" if with_recomputation else ""))
  figures = race(sides, pairs=PAIRS.value, flops=flops, hardware_flops=with_recomputation)
  print_ratios(figures)
  write_json(OUT.value, {**shared, "shape": dataclasses.asdict(shape), "tokens": length, "flops": flops, **figures})


if __name__ == "__main__":
  cli.run(main)
