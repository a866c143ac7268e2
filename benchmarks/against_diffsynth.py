"""A LoRA training step against UniVid's own, and against the same step on current DiffSynth-Studio.

  python -m benchmarks.against_diffsynth [--univid=PATH] [--diffsynth=PATH] [--context=III] [--frames=5]
      [--height=240 --width=416] [--layers=4] [--prompt_tokens=512] [--packed=2] [--dtype=float32] [--pairs=5]

The width of the 1.3B, random weights, one visual sentence of four clips per step, LoRA of rank 16 on all Linears of
attention and feed-forward, blocks recomputed in the backward pass, AdamW, loss on the last clip.

--univid is DiffSynth-Studio of March 2025 (070811e is the commit whose pipeline is closest to UniVid's) with
`diffsynth` and `examples` of UniVid's repository copied into it, see its README. It runs the class of
`examples/wanvideo/train_univid.py`, whose `training_step` gets a cached sentence. --diffsynth is a checkout of
DiffSynth-Studio 2, which has no step for visual sentences: its own functions freeze the model, add the LoRA, noise the
latents and compute the velocity as in its training of Wan, and only the target is noised and has a loss, as in UniVid.
The dependencies of both must be installed.

Both peers concatenate the latents of the clips in time and train one sentence per step, without padding of tokens; a
prompt is padded to 512 tokens. univid_jax uses rows as its loader makes them, with a prompt's padding as one token;
with --packed also rows of several such sentences. Rates are sentences per second of each program.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps import LORA_RANK, find_variant, make_row_program, make_sentence_row, shrink
from benchmarks.timing import Figures, Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.core.contexts import CONTEXT_NAMES, video_pattern
from univid_jax.core.dims import pixel_frames
from univid_jax.core.errors import UserError
from univid_jax.core.options import AttentionBackend, RematPolicy
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
UNIVID = FLAGS.string("univid", "", "Folder of DiffSynth-Studio of March 2025 with UniVid's files copied into it.")
DIFFSYNTH = FLAGS.string("diffsynth", "", "Folder of DiffSynth-Studio 2.")
CONTEXT = FLAGS.choice("context", "III", CONTEXT_NAMES, "Of the sentences.")
FRAMES = FLAGS.integer("frames", 5, "Latent frames of a video; an image has one.", lower_bound=1)
HEIGHT = FLAGS.integer("height", 240, "In pixels.", lower_bound=1)
WIDTH = FLAGS.integer("width", 416, "In pixels.", lower_bound=1)
DIM = FLAGS.integer("dim", 0, "Another width, a multiple of 128; 0 for that of the 1.3B.", lower_bound=0)
LAYERS = FLAGS.integer("layers", 4, "Blocks.", lower_bound=1)
PROMPT = FLAGS.integer("prompt_tokens", 512, "Length of the prompts.", lower_bound=1, upper_bound=512)
PACKED = FLAGS.integer("packed", 2, "Sentences of a packed row of univid_jax; 1 for no such row.", lower_bound=1)
RACE = RaceFlags(FLAGS, has_against=False)

VARIANT = "wan2.1-t2v-1.3b"
TARGETS = "q,k,v,o,ffn.0,ffn.2"
LEARNING_RATE = 1e-4
# What the checkouts must have, by flag, and how a message describes them.
CHECKOUTS = {
  "univid": (
    "DiffSynth-Studio of March 2025 with UniVid's files copied into it",
    (
      "examples/wanvideo/train_univid.py",
      "diffsynth/pipelines/univid_wan_video.py",
      "diffsynth/models/wan_video_dit.py",
      "diffsynth/schedulers/flow_match.py",
    ),
  ),
  "diffsynth": (
    "a checkout of DiffSynth-Studio 2",
    ("diffsynth/diffusion/training_module.py", "diffsynth/pipelines/wan_video.py", "diffsynth/models/wan_video_dit.py"),
  ),
}


def check_checkout(flag: str, path: str) -> None:
  """Raises UserError if a folder lacks a file that its peer needs."""
  description, files = CHECKOUTS[flag]
  for file in files:
    if not (Path(path) / file).is_file():
      raise UserError(f"--{flag} must be the folder of {description}: {path!r} has no {file}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """A step to build.

  Attributes:
    shape: shape of the transformer.
    lengths: latent frames of the clips of a sentence.
    height: height of a clip in pixels.
    width: width of a clip in pixels.
    prompt_tokens: length of the prompt.
    dtype: dtype of weights and activations.
  """

  shape: DiTConfig
  lengths: Sequence[int]
  height: int
  width: int
  prompt_tokens: int
  dtype: str

  @property
  def tokens(self) -> int:
    side = 2 * find_autoencoder(self.shape.out_dim).spatial_stride
    return sum(self.lengths) * (self.height // side) * (self.width // side)


def build_jax(*, setup: Setup, sentences: int) -> Callable[[], object]:
  import jax

  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.parallel.sharding import shard_batch

  row = make_sentence_row(
    setup.shape,
    frames=setup.lengths,
    height=setup.height,
    width=setup.width,
    prompt_tokens=setup.prompt_tokens,
    with_targets=True,
    sentences=sentences,
  )
  run = make_row_program(
    setup.shape, dtype=setup.dtype, mode="train", backend=AttentionBackend.AUTO, remat=RematPolicy.FULL
  )
  row = shard_batch(row, make_mesh({}, devices=jax.devices()[:1]))  # on the device, like the peers' rows
  return lambda: run(row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerStep:
  """The training step of a peer.

  Attributes:
    model: its transformer, with adapters.
    loss: draws noise, then a timestep, and returns the loss.
    optimizer: the adapters' optimizer.
    cast: context that casts operations.
  """

  model: Any
  loss: Callable[[], Any]
  optimizer: Any
  cast: Any

  def run(self) -> None:
    import torch

    with self.cast:
      loss = self.loss()
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad()
    if torch.cuda.is_available():
      torch.cuda.synchronize()


def build_peer(*, flag: str, path: str, setup: Setup) -> Callable[[], object]:
  """Builds the peer of --univid or --diffsynth; its package is imported from `path`."""
  return {"univid": make_univid, "diffsynth": make_diffsynth}[flag](path, setup).run


def make_univid(path: str, setup: Setup) -> PeerStep:
  """Makes UniVid's own step: its LightningModule, optimizer and all, as `Trainer(precision="bf16")` runs it."""
  import torch

  script = import_from([path, str(Path(path, "examples/wanvideo"))], "train_univid")
  model = make_wan_model(setup)

  class Models:
    """Replaces the files that a `ModelManager` loads."""

    device, torch_dtype = "cpu", getattr(torch, setup.dtype)

    def load_models(self, paths: Sequence[str]) -> None:
      pass

    def fetch_model(self, name: str, **_: object) -> Any:
      return model if name == "wan_video_dit" else None

  script.ModelManager = lambda **_: Models()
  module = script.LightningModelForTrain(
    dit_path="", learning_rate=LEARNING_RATE, lora_rank=LORA_RANK, lora_alpha=LORA_RANK, lora_target_modules=TARGETS
  )
  module.log = lambda *_, **__: None  # there is no trainer
  device = find_device()
  module.to(device)
  latents, text = make_inputs(setup)
  # As a loader reads it from the cache: every clip's number of frames, and the prompt with an extra dim.
  count_frames = [torch.tensor([pixel_frames(length)]) for length in setup.lengths]

  def loss() -> Any:
    batch = {"latents": latents, "prompt_emb": {"context": text[None]}, "image_emb": {}, "count_frames": count_frames}
    return module.training_step(batch, 0)

  cast = torch.autocast(device, dtype=torch.bfloat16, enabled=setup.dtype == "bfloat16")
  return PeerStep(model=model, loss=loss, optimizer=module.configure_optimizers(), cast=cast)


def make_diffsynth(path: str, setup: Setup) -> PeerStep:
  """Makes the step from the functions of DiffSynth-Studio 2, as its `WanTrainingModule` uses them."""
  import torch

  pipelines = import_from([path], "diffsynth.pipelines.wan_video")
  trainer = import_from([path], "diffsynth.diffusion.training_module").DiffusionTrainingModule()
  device, dtype = find_device(), getattr(torch, setup.dtype)
  pipe = trainer.pipe = pipelines.WanVideoPipeline(device=device, torch_dtype=dtype)
  pipe.dit = make_wan_model(setup)
  trainer.switch_pipe_to_training_mode(
    pipe, lora_base_model="dit", lora_target_modules=TARGETS, lora_rank=LORA_RANK, task="sft"
  )
  trainer.to(device)
  latents, text = make_inputs(setup)
  scheduler, context = pipe.scheduler, sum(setup.lengths[:-1])

  def loss() -> Any:
    target = latents[:, :, context:]
    noise = torch.randn_like(target)
    timestep = scheduler.timesteps[torch.randint(len(scheduler.timesteps), (1,))].to(device, dtype)
    noised = torch.cat([latents[:, :, :context], scheduler.add_noise(target, noise, timestep)], dim=2)
    predicted = pipe.model_fn(
      dit=pipe.dit, latents=noised, timestep=timestep, context=text, use_gradient_checkpointing=True
    )
    velocity = scheduler.training_target(target, noise, timestep)
    return torch.nn.functional.mse_loss(predicted[:, :, context:].float(), velocity.float())

  optimizer = torch.optim.AdamW(trainer.trainable_modules(), lr=LEARNING_RATE, weight_decay=1e-2)
  return PeerStep(model=pipe.dit, loss=loss, optimizer=optimizer, cast=contextlib.nullcontext())


def import_from(folders: Sequence[str], name: str) -> Any:
  """Imports a module of a checkout."""
  os.environ["USE_FLAX"] = "0"  # otherwise transformers imports JAX, whose memory would count as the peer's
  sys.path[:0] = [str(Path(folder).resolve()) for folder in folders]
  return importlib.import_module(name)


def find_device() -> str:
  import torch

  return "cuda" if torch.cuda.is_available() else "cpu"


def make_wan_model(setup: Setup) -> Any:
  """Makes the transformer of the checkout from which `diffsynth` was imported, with random weights."""
  import torch

  torch.manual_seed(0)
  names = ("dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "eps", "patch_size", "num_heads")
  options = {name: getattr(setup.shape, name) for name in (*names, "num_layers")}
  with torch.device(find_device()):
    model = importlib.import_module("diffsynth.models.wan_video_dit").WanModel(**options, has_image_input=False)
  return model.to(getattr(torch, setup.dtype))


def make_inputs(setup: Setup) -> tuple[Any, Any]:
  """Returns the latents of a sentence (1, c, t, y, x), and its prompt, padded (1, n, d)."""
  import torch

  options: dict[str, Any] = dict(dtype=getattr(torch, setup.dtype), device=find_device())
  stride, channels = find_autoencoder(setup.shape.out_dim).spatial_stride, setup.shape.out_dim
  latents = torch.ones(1, channels, sum(setup.lengths), setup.height // stride, setup.width // stride, **options)
  text = torch.zeros(1, setup.shape.text_len, setup.shape.text_dim, **options)
  text[:, : setup.prompt_tokens] = 1
  return latents, text


def print_rates(figures: Mapping[str, Figures], sentences: Mapping[str, int]) -> dict[str, float]:
  """Prints and returns the sentences per second of each program, univid_jax's relative to those of each peer."""
  rates = {name: count / figures[name]["median_s"] for name, count in sentences.items() if name in figures}
  peers = [name for name in rates if name in CHECKOUTS]
  for name, rate in rates.items():
    ratios = [f"{rate / rates[peer]:.2f} times those of {peer}" for peer in peers if name not in peers]
    print(f"{name:<23}{rate:.4f} sentences per second" + "".join(f", {ratio}" for ratio in ratios))
  return rates


@app.command(FLAGS)
def main() -> None:
  paths = {flag.name: flag.value for flag in (UNIVID, DIFFSYNTH) if flag.value}
  if not paths:
    raise UserError("--univid or --diffsynth must be the folder of a checkout, or both")
  for flag, path in paths.items():
    check_checkout(flag, path)
  shape = shrink(dataclasses.replace(find_variant(VARIANT), num_layers=LAYERS.value), DIM.value)
  side = 2 * find_autoencoder(shape.out_dim).spatial_stride
  if HEIGHT.value % side or WIDTH.value % side:
    raise UserError(f"--height and --width must be multiples of {side}, got {HEIGHT.value} and {WIDTH.value}")
  setup = Setup(
    shape=shape,
    lengths=[FRAMES.value if is_video else 1 for is_video in video_pattern(CONTEXT.value, 4)],
    height=HEIGHT.value,
    width=WIDTH.value,
    prompt_tokens=PROMPT.value,
    dtype=RACE.dtype.value,
  )
  packed = {} if PACKED.value == 1 else {f"univid_jax, {PACKED.value} per row": PACKED.value}
  sentences = {"univid_jax": 1, **packed, **dict.fromkeys(paths, 1)}
  programs = {
    name: Program(build_jax, {"setup": setup, "sentences": sentences[name]}) for name in ("univid_jax", *packed)
  }
  for flag, path in paths.items():
    programs[flag] = Program(build_peer, {"flag": flag, "path": path, "setup": setup}, is_peer=True)
  print(f"context {CONTEXT.value}: {setup.tokens:,} tokens per sentence, {shape.num_layers} layers", flush=True)
  figures = RACE.run(programs)
  rates = print_rates(figures, sentences)
  RACE.write({**dataclasses.asdict(setup), "tokens": setup.tokens, **figures, "sentences_per_s": rates})


if __name__ == "__main__":
  sys.exit(main())
