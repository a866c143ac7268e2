"""Sentences of a manifest that are not pairs and a query: what is previewed and evaluated of them."""

import json
from unittest import mock

import numpy as np
import pytest
from etils import epath

from tests.clip_files import write_image
from tests.helpers import random_pipeline
from univid_jax.checkpoints.origin import Origin
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Role, Sentence
from univid_jax.data.sources.open import open_data
from univid_jax.evaluation.controls import Case, baselines, choose_other_tasks
from univid_jax.evaluation.generate import read_generated
from univid_jax.evaluation.run import evaluate, evaluate_quick
from univid_jax.evaluation.sentences import plan_other_pairs, plan_sentences
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training import hooks
from univid_jax.training.validation import select_previews, select_sentences

WHY = "sampling makes one target after an odd number of clips (A, A', B)"


def write_manifest(folder, lines):
  """Writes a manifest; a line is a task, and the roles of its clips as letters: c, and t for targets."""
  for number in range(8):
    write_image(folder / f"{number}.png", shade=30 * number, size=(16, 16))
  names = {"c": "context", "t": "target"}
  records = [
    {"task": task, "clips": [{"path": f"{i}.png", "role": names[role]} for i, role in enumerate(roles)]}
    for task, roles in lines
  ]
  (folder / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
  return str(folder / "m.jsonl")


@pytest.fixture
def config_of(tiny_config, tmp_path):
  def config_of(*lines, **changes):
    own = {"data.manifest": write_manifest(tmp_path, lines), "data.bundled": False, "data.held_out": 0.5}
    rows = {"rows.num_tokens": 64, "eval.sentences_per_case": 4}
    return override(tiny_config, own | rows | {key.replace("__", "."): value for key, value in changes.items()})

  return config_of


def test_only_what_sampling_can_complete_is_evaluated(config_of, caplog):
  """With several targets it would be shown all but the last as context."""
  config = config_of(*[("both", "ccct")] * 4, *[("both", "cccctt")] * 4, *[("two", "ccctt")] * 2, ("odd", "cct"))
  data = open_data(config)
  data.report(config.data)
  assert f"data: manifest, 7 of 11 records can be neither previewed nor evaluated: {WHY}" in caplog.messages
  sentences = plan_sentences(config, data.held_out)
  assert sentences and {sentence.case for sentence in sentences} == {Case("both", "", 4)}
  held_out = data.held_out["manifest"].records
  left_out = sum(record.task == "two" or len(record.roles) == 6 for record in held_out)
  assert f"evaluation leaves out {left_out} of {len(held_out)} held-out records: {WHY}" in caplog.messages


def test_own_sources_are_treated_alike(config_of, caplog):
  clips = tuple(np.zeros((5, 1, 16, 16, 3), np.uint8))
  roles = (Role.CONTEXT,) * 3 + (Role.TARGET,) * 2

  class Source(list):
    task_names = ("own",)

  source = Source([Sentence(clips=clips, roles=roles), Sentence(clips=clips[:4], roles=roles[:4])])
  assert len(plan_sentences(config_of(("a", "ct")), {"own": source})) == 1
  assert f"evaluation leaves out 1 of 2 held-out records: {WHY}" in caplog.messages


def test_validation_goes_on_without_previews(config_of, tmp_path, monkeypatch, caplog):
  """What cannot be sampled has a loss all the same."""
  config = config_of(*[("two", "ccctt")] * 4, validation__previews=1, validation__sentences=3)
  data = open_data(config)
  sentences = select_sentences(data, config)
  monkeypatch.setattr(hooks, "Validation", lambda *_: lambda *_, **__: {"val_loss": 1.0})
  run = mock.Mock(config=config, validation=sentences, data=data, workdir=str(tmp_path), distillation=None)
  event = mock.Mock(validates=True, step=1, summary={})
  hooks.Validate(run, mock.Mock(), mock.Mock(), mock.MagicMock())(event)
  assert event.summary == {"val_loss": 1.0} and not run.create_pipeline.called
  assert f"previews leave out 3 of 3 sentences to validate on: {WHY}" in caplog.messages
  completable = Sentence(clips=sentences[0].clips[:4], roles=sentences[0].roles[:4])
  assert select_previews([*sentences, completable, completable], config) == [completable]


def test_without_a_sentence_to_complete_nothing_is_evaluated(config_of, tmp_path, caplog):
  config = config_of(*[("two", "ccctt")] * 4)
  pipeline, data = random_pipeline(config, make_mesh({"data": -1})), open_data(config)
  assert evaluate_quick(pipeline, config, tmp_path) is None and not (tmp_path / "eval.json").exists()
  nothing = f"there is nothing to evaluate on: no held-out sentence can be completed: {WHY}"
  assert nothing in caplog.messages
  with pytest.raises(UserError) as error:
    evaluate(pipeline, config, data=data, folder=epath.Path(tmp_path), origin=Origin(checkpoint="random"))
  assert str(error.value) == nothing


class TestWithoutExamples:
  """Sentences of B and B'."""

  def test_they_have_no_pair_to_replace_or_copy(self, config_of):
    clips = [np.zeros((1, 4, 4, 3), np.uint8), np.ones((3, 4, 4, 3), np.uint8)]
    assert {name: clip.shape for name, clip in baselines(clips).items()} == {"copy_b": (3, 4, 4, 3)}
    cases = [Case("a", "II", 2), Case("b", "II", 4), Case("c", "", 2)]
    assert choose_other_tasks(cases, np.random.default_rng(0)) == [2, None, 0]
    config = config_of(("a", "ct"), ("a", "ct"))
    assert len(plan_other_pairs(config, plan_sentences(config, open_data(config).held_out))) == 4

  @pytest.mark.parametrize("others", [[], [("b", "ccct")] * 2])
  def test_they_are_evaluated_without_controls(self, config_of, tmp_path, others):
    config = config_of(("a", "ct"), ("a", "ct"), *others, eval__batch_size=2)
    pipeline = random_pipeline(config, make_mesh({"data": -1}))
    report = evaluate_quick(pipeline, config, tmp_path)
    alone = {"psnr", "psnr_copy_b", "psnr_codec", "count"}
    assert report and report["by_task"]["a"].keys() == alone
    assert (report["overall"].keys() == alone) == (not others) and (tmp_path / "grid.png").exists()
    if others:
      assert report["by_task"]["b"].keys() == alone | {"psnr_copy_a2", "psnr_mean_a2", "psnr_swapped"}
    origin = Origin(checkpoint="random")
    origin.__dict__["checksums"] = {"trained": "abc"}
    folder = epath.Path(tmp_path / "evaluation")
    report = evaluate(pipeline, config, data=open_data(config), folder=folder, origin=origin)
    assert report and report["by_task"]["a"].keys() == {"prediction", "copy_b", "codec"}
    stored = list(read_generated(folder / report["samples"], len(report["sentences"])))
    assert [("swapped" in each.samples) for each in stored] == [len(each.clips) > 2 for each in stored]
