"""Which sentences a config draws: what rows have to hold, and what a LoRA's header records."""

import dataclasses

import numpy as np
import pytest

from univid_jax.checkpoints.sentence_lengths import check_rows, longest_sentence
from univid_jax.checkpoints.usage import Usage
from univid_jax.config.boundary import override
from univid_jax.config.data import TASK_MOTIONS
from univid_jax.config.drawn import DrawnSentences
from univid_jax.config.grids import FAMILY_MOTIONS
from univid_jax.config.presets import tiny
from univid_jax.config.section import MAX_COUNT
from univid_jax.core.contexts import CONTEXT_NAMES, Motion
from univid_jax.core.errors import UserError
from univid_jax.data.sources.computed import open_computed
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.photos import PhotoSource
from univid_jax.data.tasks import TASKS
from univid_jax.data.tasks.grids import GRID_FAMILIES

# Draws of which each kind is an eighth or more.
DRAWS = 200

EVERYTHING = override(
  tiny(),
  {
    "data.tasks": {},
    "data.contexts": dict.fromkeys(CONTEXT_NAMES, 1.0),
    "data.animating_contexts": {"I": 1.0, "II": 0.0, "III": 0.0, "IV": 1.0},
    "data.num_clips": {"clips_4": 1.0, "clips_6": 0.0, "clips_8": 1.0},
    "data.max_video_clips": 6,
  },
)


def only(**contexts):
  return {f"data.contexts.{name}": contexts.get(name, 0.0) for name in CONTEXT_NAMES}


def drawn(config):
  return DrawnSentences.from_config(config.data)


def test_the_facts_about_tasks_are_those_of_the_tasks():
  assert {name: task.motion for name, task in TASKS.items() if task.motion != Motion.OPTIONAL} == TASK_MOTIONS
  assert {name: family.motion for name, family in GRID_FAMILIES.items()} == FAMILY_MOTIONS


@pytest.mark.parametrize("task", TASKS)
def test_computed_tasks(task, monkeypatch):
  monkeypatch.setattr(PhotoSource, "bundled", lambda split, jitter: ())
  config = override(EVERYTHING, {"data.tasks": dict.fromkeys(TASKS, 0.0) | {task: 1.0}})
  source = open_computed(config, "train", seed=0)
  plans = [source.plan(index) for index in range(DRAWS)]
  assert drawn(config).kinds == {(plan.context, plan.num_clips) for plan in plans}


@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_families_of_grids(family, monkeypatch):
  grid = np.zeros((3, 3), int)
  monkeypatch.setattr(GridSentences, "_draw_clips", lambda self, rng, family, pattern: ({}, [[grid]] * len(pattern)))
  changes = {"data.weights.computed": 0.0, f"data.grids.families.{family}": 1.0, "data.height": 64, "data.width": 64}
  config = override(EVERYTHING, changes)
  source = dataclasses.replace(GridSentences.open(config), by_reference=True)
  sentences = [source[index] for index in range(DRAWS)]
  assert drawn(config).kinds == {(sentence.context, len(sentence.clips)) for sentence in sentences}


@pytest.mark.parametrize(
  "changes, contexts, counts",
  [
    ({"data.pairs": "x"}, ("I", "II", "III", "IV"), (4, 6, 8)),
    ({"data.tfds.name": "x", **only(II=1.0)}, ("II",), (4, 8)),
    ({"data.metadata": "x", **only(II=1.0)}, ("II",), (4,)),
    ({"data.metadata": "x", "data.pairs": "x", "data.num_clips.clips_4": 0.0, **only(II=1.0)}, ("II",), (4, 8)),
    ({"data.metadata": "x", "data.weights.metadata": 0.0, "data.pairs": "x", **only(II=1.0)}, ("II",), (4, 8)),
    ({"data.bundled": False}, ("I", "II", "III", "IV"), (4, 6, 8)),
    ({"data.manifest": "x"}, (), ()),
    ({"data.manifest": "x", "data.pairs": "x"}, (), ()),
    ({"data.manifest": "x", "data.weights.manifest": 0.0, "data.pairs": "x", **only(III=1.0)}, ("III",), (4, 6)),
    ({"data.arc.path": "x", "data.weights.computed": 0.0}, ("II",), ()),
    ({"data.arc.path": "x", "data.weights.arc": 0.0, "data.tasks.invert": 1.0, **only(I=1.0)}, ("I",), (4, 6)),
    ({"data.arc.test_path": "x", "data.tasks.time_reversal": 1.0}, ("I",), (4, 6)),
  ],
)
def test_sources_of_your_own(changes, contexts, counts):
  usage = Usage.from_config(override(EVERYTHING, changes))
  assert (usage.contexts, usage.clip_counts) == (contexts, counts)


def test_any_number_of_clips_is_counted_at_once():
  count = MAX_COUNT - 1
  config = override(tiny(), {"data.num_clips": {f"clips_{count}": 1.0}})
  assert drawn(config).clip_counts == (count,) and longest_sentence(config) == (32 * count, "I", count)


def test_rows_hold_what_is_drawn_and_no_more():
  images = override(tiny(), {"rows.num_tokens": 64, "data.tasks.time_reversal": 1.0, **only(II=1.0)})
  with pytest.raises(UserError, match="4 clips of context I has 128 tokens"):
    check_rows(images)
  check_rows(override(images, {"data.tasks.time_reversal": 0.0, **only(IV=1.0)}))  # IV is II for other tasks
  grids = override(images, {"data.weights.computed": 0.0, "data.grids.families.recolor": 1.0, **only(I=1.0)})
  check_rows(grids)
  with pytest.raises(UserError, match="4 clips of context I has 128 tokens"):
    check_rows(override(grids, {"data.grids.families.life": 1.0}))
  arc = {"data.weights.computed": 0.0, "data.arc.path": "x"}
  check_rows(override(images, arc))
  manifest = {"data.weights.computed": 0.0, "data.bundled": False, "data.manifest": "x"}
  with pytest.raises(UserError, match="4 clips of context I has 128 tokens"):
    check_rows(override(images, manifest))
