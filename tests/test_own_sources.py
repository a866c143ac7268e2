"""Sources of sentences of one's own: read by the loader and trained on; wrong ones are named in one line."""

import re
from contextlib import closing

import jax
import numpy as np
import pytest

from tests.helpers import compile_plain_step
from tests.typecheck import unchecked
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run_parts import context_mode, open_encoders, transformer_config
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import ClipRef, Sentence, reference_roles
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import make_loader
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources.open import DataSources
from univid_jax.evaluation.run import evaluate, evaluate_quick
from univid_jax.inference.load import load_pipeline
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training import loop, setup
from univid_jax.training.loop import train


class Negatives:
  """Sentences of noise and its negative.

  Args:
    change: of the sentences.
    count: how many there are.
    name: of the records.
  """

  task_names = ("negative",)

  def __init__(self, change=lambda sentence: sentence, count=20, name=""):
    self.change, self.count, self.name = change, count, name

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    a, b = np.random.default_rng(index).integers(0, 256, (2, 1, 16, 16, 3)).astype(np.uint8)
    roles = reference_roles(4)
    return self.change(Sentence(clips=(a, 255 - a, b, 255 - b), roles=roles, task="negative", context="II"))


class Identified(Negatives):
  def identify_records(self):
    return {f"{self.name}{index}": self.name for index in range(self.count)}


def sources(make=Negatives, **options):
  return DataSources({"mine": make(**options)}, {"mine": 1.0}, held_out={"mine": make(count=2, name="other")})


def open_loader(config, source):
  """The loader of one source without a run."""
  encoders = open_encoders(config, make_mesh(config.mesh))
  features = FeatureMaker(encoders, shape=transformer_config(config), task_names=Negatives.task_names)
  shape = RowShape.from_config(config.rows, context_mode(config))
  return make_loader(source, features, row_shape=shape, layout=BatchLayout(num_rows=4), seed=0)


def with_clips(change):
  return lambda sentence: sentence.replace(clips=change(sentence.clips))


class TestLoader:
  @pytest.mark.parametrize(
    "change, message",
    [
      (
        with_clips(lambda clips: tuple((clip / 255).astype(np.float32) for clip in clips)),
        "clip 1 of a sentence must be frames, uint8 (T, H, W, 3), or a ClipRef, got float32 (1, 16, 16, 3)",
      ),
      (with_clips(lambda clips: (clips[0], clips[1][0], *clips[2:])), "clip 2 of a sentence must be frames"),
      (with_clips(lambda clips: (*clips[:3], clips[3][..., :1])), "got uint8 (1, 16, 16, 1)"),
      (with_clips(lambda clips: [1, 2, 3, 4]), "got int"),
      (
        with_clips(lambda clips: (clips[0][:, :8], *clips[1:])),
        "the clips of a sentence must have one size, got 16 x 8, 16 x 16, 16 x 16, 16 x 16 (width x height)",
      ),
      (
        with_clips(lambda clips: (*clips[:3], ClipRef(lambda: "", lambda: clips[3], 1, (32, 16)))),
        "the clips of a sentence must have one size, got 16 x 16, 16 x 16, 16 x 16, 16 x 32",
      ),
      (with_clips(lambda clips: tuple(clip[:, :14] for clip in clips)), "the height must be a multiple of 4, got 14"),
    ],
  )
  @pytest.mark.parametrize("record, begins", [("pair 7", "pair 7"), ("", "sentence [0-9]+")])
  def test_wrong_sentences(self, tiny_config, change, message, record, begins):
    source = Negatives(lambda sentence: change(sentence).replace(record=record))
    match = f"^{begins} cannot be used: .*{re.escape(message)}"
    with unchecked(), closing(open_loader(tiny_config, [source])) as loader, pytest.raises(UserError, match=match):
      next(loader)

  @pytest.mark.parametrize(
    "source, message",
    [
      ([Negatives(count=0)], "a source is empty: Negatives has no sentence"),
      ([], "sources must be a list of one or more sources of sentences, got list"),
      (Negatives(), "sources must be a list of one or more sources of sentences, got Negatives"),
      ([[1, 2]], "a source must be a source of sentences, with task_names, len(source) and source[index], got list"),
    ],
  )
  def test_wrong_sources(self, tiny_config, source, message):
    with pytest.raises(UserError, match=re.escape(message)):
      open_loader(tiny_config, source)

  @pytest.mark.parametrize("wrap", [lambda state: state, lambda state: [state]])
  def test_goes_on_where_it_was(self, tiny_config, wrap):
    with closing(open_loader(tiny_config, [Negatives()])) as loader:
      next(loader)
      state, expected = loader.get_state(), next(loader)
    with closing(open_loader(tiny_config, [Negatives()])) as again:
      again.set_state(wrap(state))
      assert jax.tree.all(jax.tree.map(np.array_equal, next(again), expected))


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: DataSources({"mine": Negatives()}, {}),
      r"DataSources.weights\['mine'\] must be a positive number, got None",
    ),
    (lambda: DataSources({"mine": Negatives()}, {"mine": 1.0, "his": 1.0}), "has 'his', which is none of its sources"),
    (
      lambda: DataSources({"mine": Negatives()}, {"mine": 0.0}),
      r"DataSources.weights\['mine'\] must be a positive number, got 0.0",
    ),
    (lambda: DataSources({"mine": [1]}, {"mine": 1.0}), "the data 'mine' must be a source of sentences"),
    (lambda: sources(count=0), "the data 'mine' is empty: Negatives has no sentence"),
  ],
)
def test_wrong_data(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_sources_are_drawn_by_their_own_weights(tiny_config, tmp_path, monkeypatch):
  """In whatever order the weights are given."""
  data = DataSources({"a": Negatives(), "b": Negatives()}, {"b": 1.0, "a": 3.0})
  run = setup.set_up_run(tiny_config, tmp_path, data=data)
  monkeypatch.setattr(loop, "make_loader", lambda sources, features, *, weights, **options: weights)
  assert loop.open_loader(run) == [3.0, 1.0]


class TestTraining:
  def test_a_run_on_own_sources(self, tiny_config, tmp_path, monkeypatch):
    """It is resumed on the same, and evaluated on what is held out."""
    monkeypatch.setattr(loop, "compile_train_step", compile_plain_step)
    config = override(tiny_config, {"num_steps": 2, "validation.every_steps": 2, "validation.previews": 0})
    longer, workdir = override(config, {"num_steps": 4}), tmp_path / "run"
    assert train(config, workdir, data=sources(Identified)).steps_taken == 2
    assert train(longer, workdir, data=sources(Identified)).steps_taken == 2
    with pytest.raises(UserError, match=r"the data of .* has changed since the run started: mine had 20 records"):
      train(longer, workdir, data=sources(Identified, name="new "))
    with pytest.raises(UserError, match="computed was added"):
      train(longer, workdir)
    data, pipeline = sources(Identified), load_pipeline(workdir)
    report = evaluate(pipeline, longer, data=data, folder=tmp_path / "evaluation", origin=Origin.resolve(str(workdir)))
    assert report and list(report["by_task"]) == ["negative"]
    quick = evaluate_quick(pipeline, longer, tmp_path / "evaluation", data=data)
    assert quick and list(quick["by_task"]) == ["negative"]
    nothing = DataSources({"mine": Negatives()}, {"mine": 1.0})
    with pytest.raises(UserError, match=r"there is nothing to evaluate on: DataSources\.held_out is empty"):
      evaluate(pipeline, longer, data=nothing, folder=tmp_path / "none", origin=Origin.resolve(str(workdir)))

  @pytest.mark.parametrize("process", [0, 1])
  def test_the_first_process_reports_what_all_see(self, tiny_config, tmp_path, monkeypatch, caplog, process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    data = DataSources({"mine": Negatives()}, {"mine": 1.0})
    setup.set_up_run(override(tiny_config, {"validation.every_steps": 0}), str(tmp_path), data=data)
    assert ("data: nothing to validate and evaluate on" in caplog.text) == (process == 0)

  def test_wrong_sentences_are_named(self, tiny_config, tmp_path):
    data = sources(change=with_clips(lambda clips: tuple((clip / 255).astype(np.float32) for clip in clips)))
    with pytest.raises(UserError, match=r"must be frames, uint8 \(T, H, W, 3\), or a ClipRef, got float32"):
      train(tiny_config, str(tmp_path), data=data)
