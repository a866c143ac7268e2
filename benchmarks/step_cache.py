"""Step caching: speed-up and distance from the dense sample by threshold; and four steps against fifty guided ones.

  python -m benchmarks.step_cache [--checkpoint=runs/tiny] [--steps=50] [--pairs=5] [--thresholds=0.06,0.12,0.24]
      [--dim=512] [--layers=6] [--height=96 --width=96] [--guidance_scale=2]

Samples one sentence of videos, with the weights of --checkpoint or random ones of a mid-size model, with and without
cached context. Times are for denoising, without encoding and decoding. Dense and cached samples run in turn. PSNR, in
dB, compares frames with those of the dense sample with the same noise.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.schema import RunConfig

FLAGS = CommandFlags(__doc__)
CHECKPOINT = FLAGS.string("checkpoint", "", "A workdir or converted checkpoint instead of a random model.")
DIM = FLAGS.integer("dim", 512, "Width of the random model; the feed-forward has four times as much, a head 64.")
LAYERS = FLAGS.integer("layers", 6, "Its blocks.")
HEIGHT = FLAGS.integer("height", 96, "Of its clips, in pixels.")
WIDTH = FLAGS.integer("width", 96, "Of its clips, in pixels.")
STEPS = FLAGS.integer("steps", 50, "Euler steps.", lower_bound=1)
GUIDANCE_SCALE = FLAGS.number("guidance_scale", 2.0, "Guidance scale of all samples except those in four steps.")
THRESHOLDS = FLAGS.strings("thresholds", ["0.06", "0.12", "0.24"], "Of the step cache.")
MAX_SKIP = FLAGS.integer("max_skip", 2, "Of the step cache.", lower_bound=1)
PAIRS = FLAGS.integer("pairs", 5, "Timed runs of each kind.", lower_bound=1)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")


class TimedSampler:
  """Forwards calls to a sampler, and keeps the duration of the last one."""

  def __init__(self, sampler: Any):
    self._sampler, self.seconds = sampler, 0.0

  def sample(self, *args: Any, **options: Any) -> Any:
    start = time.perf_counter()
    result = self._sampler.sample(*args, **options)
    self.seconds = time.perf_counter() - start
    return result


def open_pipeline(attention: str) -> Any:
  """Opens the model, with the time of denoising in `pipeline.sampler.seconds`."""
  import jax

  from univid_jax import load_pipeline
  from univid_jax.config.boundary import override
  from univid_jax.config.presets import tiny
  from univid_jax.parallel.mesh import make_mesh

  if CHECKPOINT.value:
    mesh = make_mesh({}, devices=jax.devices()[:1])
    pipeline = load_pipeline(
      CHECKPOINT.value, mesh=mesh, attention=attention, context_timestep="zero" if "causal" in attention else None
    )
  else:
    dim = DIM.value
    changes = {
      "model.dim": dim,
      "model.ffn_dim": 4 * dim,
      "model.num_heads": dim // 64,
      "model.freq_dim": 256,
      "model.look_back": (),
    }
    changes |= {"model.num_layers": LAYERS.value, "data.height": HEIGHT.value, "data.width": WIDTH.value}
    pipeline = random_pipeline(override(tiny(), {**changes, "model.attention": attention}))
  pipeline.sampler = TimedSampler(pipeline.sampler)  # pyright: ignore[reportAttributeAccessIssue]
  return pipeline


def random_pipeline(config: RunConfig) -> Any:
  """Builds a pipeline on one device with random weights."""
  import jax
  from flax import nnx

  from univid_jax import Pipeline
  from univid_jax.checkpoints.run_parts import create_model, open_encoders, transformer_config
  from univid_jax.checkpoints.usage import Usage
  from univid_jax.inference.experts import Transformer
  from univid_jax.parallel.mesh import make_mesh

  mesh = make_mesh({}, devices=jax.devices()[:1])
  graph, params = nnx.split(create_model(config), nnx.Param)
  return Pipeline(
    transformer_config(config),
    [Transformer(graph, nnx.to_pure_dict(params))],
    encoders=open_encoders(config, mesh),
    mesh=mesh,
    usage=Usage.from_config(config),
  )


def make_clips(pipeline: Any) -> list[np.ndarray]:
  """Returns A, A' = inverted A, and B: smooth colours that move."""
  (height, width), length = pipeline.size, pipeline.num_frames
  t, y, x = np.meshgrid(np.arange(length) / 8, np.arange(height) / height, np.arange(width) / width, indexing="ij")
  waves = [np.stack([np.sin(6 * (y + k * x) + t + n) for n in range(3)], axis=-1) for k in (1, -2)]
  a, b = ((127.5 * (wave + 1)).astype(np.uint8) for wave in waves)
  return [a, 255 - a, b]


def negative_prompt(pipeline: Any) -> np.ndarray:
  """Returns the embedding of one token, which differs from the null prompt, so that guidance has an effect."""
  return np.ones((1, pipeline.config.text_dim), np.float32)


def psnr(frames: np.ndarray, dense: np.ndarray) -> float:
  error = np.mean(np.square(frames.astype(np.float64) - dense))
  return float(10 * np.log10(255**2 / error)) if error else float("inf")


def race(pipeline: Any, clips: Sequence[np.ndarray], first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
  """Samples in two ways, in turn after a warm-up; returns medians, the median ratio, and the PSNR between the two."""
  frames, seconds = {}, {"first": [], "second": []}
  for _ in range(1 + PAIRS.value):
    for name, options in (("first", first), ("second", second)):
      frames[name] = pipeline.sample(clips, **options, negative_prompt_embeds=negative_prompt(pipeline)).frames
      seconds[name].append(pipeline.sampler.seconds)
  (_, *one), (_, *two) = seconds.values()
  return {
    "first_s": round(statistics.median(one), 3),
    "second_s": round(statistics.median(two), 3),
    "speed_up": round(statistics.median(a / b for a, b in zip(one, two)), 2),
    "psnr": round(psnr(frames["second"], frames["first"]), 1),
  }


@app.command(FLAGS)
def main() -> None:
  import dataclasses

  from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache

  figures: dict[str, dict[str, float]] = {}
  for attention in ("full", "context_causal"):
    pipeline = open_pipeline(attention)
    clips = make_clips(pipeline)
    dense = {"num_inference_steps": STEPS.value, "guidance_scale": GUIDANCE_SCALE.value}
    measurement = RatioMeasurement()
    away = negative_prompt(pipeline)
    pipeline.sample(clips, **dense, seed=1, step_cache=measurement, negative_prompt_embeds=away)
    for threshold in map(float, THRESHOLDS.value):
      cache = StepCache(ratios=measurement.table, threshold=threshold, max_skip=MAX_SKIP.value)
      plan = dataclasses.replace(pipeline.plan(**dense), step_cache=cache)
      experts = [pipeline.experts.find(sigma) for sigma in plan.sigmas.tolist()]
      computed = plan.computed_steps(experts, plan.guided_steps() & (GUIDANCE_SCALE.value != 1))
      share = 1.0 if computed is None else float(computed[: len(measurement.table)].mean())
      name = f"{attention}, threshold {threshold:g}"
      figures[name] = {"computed": round(share, 2), **race(pipeline, clips, dense, {**dense, "step_cache": cache})}
      print(f"{name:<36}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
    name = f"{attention}, four steps"
    figures[name] = race(pipeline, clips, dense, {"solver": "distilled"})
    print(f"{name:<36}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
  write_json(OUT.value, figures)


if __name__ == "__main__":
  sys.exit(main())
