"""Paints B': python -m univid_jax.sample --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image (png, jpg), a video (mp4, webm, mov, mkv, gif), a folder of frames, or a .npy of uint8 (T, H, W, 3), of
any size and rate: it is resized and its middle cut out to the size that the model was trained on, and of a video the first
frames are used. What was painted comes with a .json beside it that says how. With --queries=B1.mp4,B2.mp4 (or a folder), --clips
are the example pairs alone, and --out is a folder that gets one clip a query.
"""

import json
import re
from pathlib import Path

from absl import flags

from univid_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint, or the workdir of a training run.", required=True)
LORA = flags.DEFINE_list("lora", [], "LoRA files or folders; PATH:WEIGHT gives one a weight other than 1.")
MERGE_LORA = flags.DEFINE_bool("merge_lora", False, "Add LoRAs to the weights: a little faster, the same result to rounding.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the model; bfloat16, or what a run was trained in.")
ATTENTION = flags.DEFINE_enum("attention", None, ["full", "context_causal"], "What the model was trained with; known by default.")
STEP = flags.DEFINE_string("step", None, "Of a workdir's checkpoints: a number, or best; the latest by default.")
CLIPS = flags.DEFINE_list("clips", None, "The context in order: A, A', B (or any odd number of clips).", required=True)
QUERIES = flags.DEFINE_list("queries", [], "Many B for the same example pairs: clips, or a folder of them.")
OUT = flags.DEFINE_string("out", None, "Where the painted clip goes: .png (an image), .mp4 (a video) or .npy.", required=True)
GRID = flags.DEFINE_bool("grid", False, "Also write A | A' | B | B' side by side: OUT with _grid before its ending.")
PROMPT = flags.DEFINE_string("prompt", None, "The text of the sentence; none by default.")
TASK = flags.DEFINE_string("task", None, "Name of a task, for the paper's detailed prompt: depth map, camera movement, ...")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
SIZE = flags.DEFINE_string("size", None, "HEIGHTxWIDTH in pixels; that of the training by default.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames to paint, 4n + 1; inferred by default.", lower_bound=1)
SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "unipc"], "euler is the reference's; unipc needs fewer steps.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps of the sampler.", lower_bound=1)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none.")
SHIFT = flags.DEFINE_float("shift", 5.0, "Shift of the noise levels toward noise.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def main() -> None:
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from tqdm import tqdm

  import univid_jax
  from univid_jax.compilation import keep_programs
  from univid_jax.data.clips import file_hash
  from univid_jax.data.sentences import prompt_for
  from univid_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_context, write_clip
  from univid_jax.metrics.figures import beside
  from univid_jax.pipeline import load_pipeline

  keep_programs()
  if PROMPT.value is not None and TASK.value is not None:
    raise cli.UserError("give --prompt or --task, not both")
  prompt = prompt_for(TASK.value.replace("_", " "), "detailed") if TASK.value else PROMPT.value or ""
  pipeline = load_pipeline(CHECKPOINT.value, lora=[weighted(item) for item in LORA.value], dtype=DTYPE.value,
                           merge_lora=MERGE_LORA.value, attention=ATTENTION.value, step=STEP.value)
  size = parse_size(SIZE.value) if SIZE.value else pipeline.size
  for query, target in jobs(CLIPS.value, QUERIES.value, OUT.value):
    paths = [*CLIPS.value, *query]
    clips, fps = read_context(paths, num_frames=pipeline.num_frames, size=size)
    options = dict(num_frames=NUM_FRAMES.value, num_inference_steps=STEPS.value, guidance_scale=GUIDANCE_SCALE.value,
                   negative_prompt=NEGATIVE_PROMPT.value, shift=SHIFT.value, seed=SEED.value, solver=SOLVER.value)
    with tqdm(total=STEPS.value, desc="sample", unit="step") as bar:
      out = pipeline.sample(clips, prompt, **options, progress=lambda taken, bar=bar: bar.update(taken - bar.n))
    if target.suffix == "":  # a query's: an image where one was painted
      target = target.with_name(target.name + (".png" if len(out.frames) == 1 else ".mp4"))
    write_clip(target, out.frames, fps=fps)
    if GRID.value:
      side_by_side = beside([*clips, out.frames])
      ending = target.suffix if target.suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES else ".mp4"
      ending = ".png" if len(side_by_side) == 1 else ".mp4" if ending in IMAGE_SUFFIXES else ending
      write_clip(target.with_name(f"{target.stem}_grid{ending}"), side_by_side, fps=fps)
    height, width = out.frames.shape[1:3]
    record = {"version": univid_jax.__version__, "checkpoint": CHECKPOINT.value, "lora": LORA.value,
              "merge_lora": MERGE_LORA.value, "dtype": str(pipeline.dtype), "prompt": prompt,
              "clips": [{"path": str(path), "sha256": file_hash(Path(path))} for path in paths],
              "height": height, "width": width, **options, "num_frames": len(out.frames), "fps": fps}
    target.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"painted {len(out.frames)} frame{'s' * (len(out.frames) > 1)} of {width}x{height}: {target}")


def jobs(clips: list[str], queries: list[str], out: str) -> list[tuple[list[str], Path]]:
  """The query of each clip to be painted (none where --clips has it) and where that goes.

  Raises:
    UserError: example pairs without partners, or two queries of one name.
  """
  if not queries:
    return [([], Path(out))]
  if len(clips) % 2:
    raise cli.UserError(f"with --queries, --clips are pairs A, A', an even number; got {len(clips)}")
  if len(queries) == 1 and Path(queries[0]).is_dir():
    queries = [str(path) for path in sorted(Path(queries[0]).iterdir()) if path.suffix.lower() in CLIP_SUFFIXES]
    if not queries:
      raise cli.UserError("no clips in the folder of --queries")
  names = [Path(query).stem for query in queries]
  twice = next((name for name in names if names.count(name) > 1), None)
  if twice:
    raise cli.UserError(f"two queries are named {twice!r}, and each is painted to a file of its name")
  return [([query], Path(out) / name) for query, name in zip(queries, names)]


# Files that a folder of queries is searched for.
CLIP_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".mp4", ".webm", ".mov", ".mkv", ".gif", ".npy")


def weighted(item: str) -> tuple[str, float]:
  """A LoRA's path and weight."""
  path, _, weight = item.rpartition(":")
  try:
    return (path, float(weight)) if path else (item, 1.0)
  except ValueError:
    return item, 1.0


def parse_size(text: str) -> tuple[int, int]:
  """HEIGHTxWIDTH as numbers.

  Raises:
    ValueError: it is something else.
  """
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if not match:
    raise ValueError(f"a size is HEIGHTxWIDTH, for instance 480x832, got {text!r}")
  return int(match[1]), int(match[2])


if __name__ == "__main__":
  cli.run(main)
