"""What determines stored samples: their folder is named after it, so that a report never mixes two models."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

import univid_jax
from univid_jax.checkpoints.origin import Origin
from univid_jax.config.boundary import to_json
from univid_jax.config.schema import DataConfig, EvalConfig, RunConfig
from univid_jax.core.json_files import write_json
from univid_jax.diffusion.distillations import Distillation
from univid_jax.evaluation.sentences import PlannedSentence
from univid_jax.inference.plan import SAMPLING_VERSION

SAMPLES = "samples"
FILE = "origin.json"


# Sections of the config that samples depend on, given the model and the sentences.
SECTIONS = ("data", "eval")
# Options in these sections that samples do not depend on.
_SCORING = ("depth_alignment", "palette", "num_labels", "void_label", "clip_model")
READING = ("cache", "num_threads", "stream_processes", "allow_dropped", "prompt_dropout")


def open_samples_folder(
  folder: epath.Path,
  config: RunConfig,
  sentences: Sequence[PlannedSentence],
  origin: Origin,
  *,
  distillation: Distillation | None = None,
  write: bool,
) -> epath.Path:
  """Returns the folder for the samples of a model, which may already hold some.

  Args:
    folder: folder of the evaluation.
    config: config of the evaluation.
    sentences: sentences of the evaluation.
    origin: origin of the model.
    distillation: how samples with a distillation LoRA are made, if there are any.
    write: whether this process describes the samples in the folder.
  """
  values = _describe(config, sentences, origin)
  if distillation is not None:  # under the name by which stored samples are looked up
    values["accelerator"] = {
      name: value for name, value in dataclasses.asdict(distillation).items() if name != "pattern"
    }
  name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
  samples = folder / SAMPLES / name
  if write:
    write_json(samples / FILE, {"origin": origin.to_json(), **values})
  return samples


def _describe(config: RunConfig, sentences: Sequence[PlannedSentence], origin: Origin) -> dict[str, Any]:
  """Describes everything that determines samples, as JSON-compatible values."""
  values = to_json(
    dataclasses.replace(
      config, eval=_reset(config.eval, EvalConfig(), _SCORING), data=_reset(config.data, DataConfig(), READING)
    )
  )
  return {
    "weights": dict(origin.checksums),
    "config": {name: values[name] for name in SECTIONS},
    "sentences": hashlib.sha256(repr([each.identify() for each in sentences]).encode()).hexdigest(),
    "version": univid_jax.__version__,
    "sampling_version": SAMPLING_VERSION,
  }


def _reset(section: Any, default: Any, names: Sequence[str]) -> Any:
  return dataclasses.replace(section, **{name: getattr(default, name) for name in names})
