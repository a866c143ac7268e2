"""How training goes, on sentences that it does not see: a loss that can be compared from step to step, and pictures."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax import build
from univid_jax.data.cache import read_frames
from univid_jax.data.loader import CONTEXT_NAMES, FeatureMaker
from univid_jax.data.packing import pack_rows
from univid_jax.data.video import write_clip
from univid_jax.diffusion.loss import sentence_losses
from univid_jax.files import local_file
from univid_jax.metrics.figures import COLUMNS, beside, sentence_grid
from univid_jax.models.lora import join
from univid_jax.parallel.sharding import own_rows, shard_batch
from univid_jax.pipeline import Pipeline
from univid_jax.training.step import Params, StateSpec
from univid_jax.types import Sentence

PREVIEWS = "previews"


class Validation:
  """The loss at fixed noise levels with fixed noise, over the same sentences each time.

  Args:
    config: of the run; its `validation` says how many sentences and which levels.
    spec: of the training state.
    sentences: what to measure on; their clips are pixels, or still to be read.
    make_features: turns them into what a row holds.
    mesh: the devices.
  """

  def __init__(self, config: Mapping[str, Any], spec: StateSpec, sentences: Sequence[Sentence], make_features: FeatureMaker,
               mesh: Mesh):
    self._mesh, self._tasks = mesh, tuple(make_features.task_names)
    self._sigmas = tuple(config["validation"]["sigmas"])
    rows, _ = pack_rows([make_features(sentence) for sentence in sentences], build.row_shape(config))
    noise = np.asarray(jax.random.normal(jax.random.key(config["seed"]), rows.tokens.shape))
    size = build.rows_per_batch(config, mesh)

    def batch(start):
      return shard_batch(jax.tree.map(lambda x: _rows(x[start:start + size], size, mesh), (rows, noise)), mesh)

    self._batches = [batch(start) for start in range(0, len(noise), size)]

    def totals(params: Params, frozen: Params, row, noise, sigma):
      """Of losses, and sentences, by task and by context; the first entry is of sentences without either."""
      model = nnx.merge(spec.graph, join(frozen, params))
      losses, counts = sentence_losses(model, row, noise, jnp.full((len(row.tokens), row.num_slots), sigma))
      kinds = [jax.nn.one_hot(row.task_ids, 1 + len(self._tasks)), jax.nn.one_hot(row.context_ids, 1 + len(CONTEXT_NAMES))]
      return [jnp.einsum("bs,bsk->k", values, kind) for values in (losses, counts) for kind in kinds]

    self._totals = jax.jit(totals, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(self, params: Params, frozen: Params) -> dict[str, float]:
    """val_loss, and by noise level, task and context; each the mean over sentences (and levels).

    Args:
      params: what is trained.
      frozen: the rest of the model.
    """
    metrics, sums = {}, []
    with jax.set_mesh(self._mesh):
      for sigma in self._sigmas:
        parts = [jax.device_get(self._totals(params, frozen, *batch, jnp.float32(sigma))) for batch in self._batches]
        sums.append([sum(values) for values in zip(*parts)])
        metrics[f"val_loss/sigma_{sigma:g}"] = float(sums[-1][0].sum() / sums[-1][2].sum())
    tasks, contexts, task_counts, context_counts = (np.sum(values, axis=0) for values in zip(*sums))
    for names, kind, totals, counts in ((self._tasks, "task", tasks, task_counts),
                                        (CONTEXT_NAMES, "context", contexts, context_counts)):
      metrics |= {f"val_loss/{kind}_{name}": float(total / count)
                  for name, total, count in zip(names, totals[1:], counts[1:]) if count}
    return {"val_loss": float(tasks.sum() / task_counts.sum())} | metrics


def validation_sentences(data: build.DataSources, count: int) -> tuple[list[Sentence], bool]:
  """So many sentences, of all kinds of data in turn, and whether training does not see them."""
  held_out = bool(data.held_out)
  sources = data.held_out if held_out else data.sources
  streams = [(source[i] for i in range(min(len(source), count))) for source in sources.values()]
  in_turn = (sentence for group in itertools.zip_longest(*streams) for sentence in group if sentence is not None)
  return list(itertools.islice(in_turn, count)), held_out


def write_previews(folder: epath.Path, step: int, pipeline: Pipeline, sentences: Sequence[Sentence], *, num_inference_steps: int,
                   seed: int) -> None:
  """Paints the sentences' targets and writes step_NNNNNN.png with all, and a video of each that is one.

  Every process paints, the first one writes.
  """
  sentences = [sentence.replace(clips=tuple(read_frames(clip) for clip in sentence.clips)) for sentence in sentences]
  painted = pipeline.sample_sentences(sentences, num_inference_steps=num_inference_steps, seed=seed)
  if jax.process_index() > 0:
    return
  rows = []
  for index, (sentence, clip) in enumerate(zip(sentences, painted)):
    *context, truth = sentence.clips
    row = (*context[-3:], clip, truth)
    rows.append((f"{sentence.task.replace('_', ' ')}\ncontext {sentence.context or '-'}", row))
    if len(truth) > 1:
      with local_file(folder / f"step_{step:06d}_{index}.mp4") as path:
        write_clip(path, beside(row), fps=8)
  with local_file(folder / f"step_{step:06d}.png") as path:
    sentence_grid(path, rows, columns=COLUMNS)


def _rows(x: np.ndarray, size: int, mesh: Mesh) -> np.ndarray:
  """This process's rows of a batch, which is filled up with empty rows."""
  return own_rows(np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1)), mesh)
