"""The evaluator: sentences, controls, scores and reports; the evaluate command has its own tests."""

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.clip_files import write_image, write_pairs
from tests.helpers import image_width, random_pipeline
from tests.typecheck import unchecked
from univid_jax.checkpoints.origin import Origin
from univid_jax.config.boundary import override, to_json
from univid_jax.config.presets import grids, tiny
from univid_jax.core.contexts import CONTEXTS
from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.pictures import GAP, HEADER, TILE, sentence_animation, sentence_grid
from univid_jax.data.sources.open import open_data
from univid_jax.data.target_kinds import label_colors, normals_to_image
from univid_jax.data.tasks.grids.rendering import Rendering
from univid_jax.evaluation import report, run
from univid_jax.evaluation.controls import (
  Case,
  baselines,
  choose_other_tasks,
  match_length,
  replace_pairs,
  round_trip,
  show_inverse_task,
)
from univid_jax.evaluation.exact import score_grids
from univid_jax.evaluation.generate import Generated, SentenceInfo, _noise_seed, make_variants, sample_targets
from univid_jax.evaluation.kinds import KIND_METRICS, KindOptions, unmix_colors
from univid_jax.evaluation.metrics.dense import nearest_labels
from univid_jax.evaluation.metrics.image import psnr
from univid_jax.evaluation.report import QUICK_KEYS
from univid_jax.evaluation.run import is_evaluated
from univid_jax.evaluation.score import Score, Scorer
from univid_jax.evaluation.sentences import _plan, plan_other_pairs, plan_sentences
from univid_jax.evaluation.stored_samples import open_samples_folder
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.metrics_writer import join_short, plot_loss


def fixed_origin(checksum: str = "abc", **names) -> Origin:
  """Returns an origin without files."""
  origin = Origin(**({"checkpoint": "random"} | names))
  origin.__dict__["checksums"] = {"trained": checksum}
  return origin


ORIGIN = fixed_origin()


def select(config):
  return plan_sentences(config, open_data(config).held_out)


class TestSentences:
  def test_every_case_has_the_same_number(self, tiny_config):
    config = override(tiny_config, {"eval.sentences_per_case": 2, "data.num_clips.clips_6": 1.0})
    sentences = select(config)
    cases = [sentence.case for sentence in sentences]
    assert all(cases.count(case) == 2 for case in cases)
    assert {case.task for case in cases} == {task for task, weight in config.data.tasks.items() if weight}
    assert {case.context for case in cases} == set(CONTEXTS) and {case.num_clips for case in cases} == {4, 6}
    for planned in sentences:
      sentence = planned.read()
      assert Case(sentence.task, sentence.context, len(sentence.clips)) == planned.case

  def test_cases_with_videos_have_no_more_clips_than_their_sentences(self, tiny_config):
    changes = {"eval.sentences_per_case": 1, "data.num_clips.clips_6": 1.0, "data.max_video_clips": 4}
    config = override(
      tiny_config, changes | {"data.grids.families.life": 1.0, "data.grids.min_side": 3, "data.grids.max_side": 4}
    )
    sentences = select(config)
    counts = {(s.case.context == "II", s.case.num_clips) for s in sentences}
    assert counts == {(True, 4), (True, 6), (False, 4)} and len({s.case for s in sentences}) == len(sentences)
    assert all(len(planned.read().clips) == planned.case.num_clips for planned in sentences)

  def test_order_of_keys_does_not_matter(self, tiny_config):
    """Flags sort the keys of a config, Python does not; the sentences are the same."""
    data = dataclasses.replace(tiny_config.data, tasks=dict(sorted(tiny_config.data.tasks.items())))
    for a, b in zip(select(tiny_config), select(dataclasses.replace(tiny_config, data=data)), strict=True):
      assert a.case == b.case
      assert all(np.array_equal(x, y) for x, y in zip(a.read().clips, b.read().clips))


class TestControls:
  def test_match_length(self):
    clip = np.arange(3)[:, None, None, None]
    assert match_length(clip, 5).ravel().tolist() == [0, 1, 2, 2, 2] and match_length(clip, 1).ravel().tolist() == [0]

  def test_baselines_have_the_length_of_the_target(self):
    a, b = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 9, np.uint8)
    a2 = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 30)])
    found = baselines([a, a2, b, np.zeros((3, 4, 4, 3), np.uint8)])
    assert found["copy_b"].shape == (3, 4, 4, 3) and (found["copy_b"] == 9).all()
    assert found["copy_a2"][:, 0, 0, 0].tolist() == [10, 30, 30]
    assert found["mean_a2"].dtype == np.uint8 and (found["mean_a2"] == 20).all()

  def test_the_mean_colour_is_rounded(self):
    clips = [
      np.array(greys, np.uint8)[:, None, None, None].repeat(3, axis=3) for greys in ([5], [0, 1, 1], [9], [5, 5])
    ]
    assert (baselines(clips)["mean_a2"] == 1).all()

  def test_no_two_sentences_share_their_noise(self):
    """Of up to 100,000 sentences and 10 repetitions; reports depend on the numbers."""
    first = [_noise_seed(seed, repetition) for seed in (0, 1, 2) for repetition in range(10)]
    assert first == [100_000 * number for number in range(30)]

  def test_swapped_pairs_are_of_another_task(self, tiny_config):
    planned = select(tiny_config)
    sentences = [each.read() for each in planned]
    swap = make_variants(tiny_config.eval, plan_other_pairs(tiny_config, planned))[1].alter
    for number, sentence in enumerate(sentences):
      swapped = swap(number, sentence)
      assert all(a is b for a, b in zip(swapped.clips[-2:], sentence.clips[-2:]))
      assert [clip.shape for clip in swapped.clips] == [clip.shape for clip in sentence.clips]
      assert not np.array_equal(swapped.clips[0], sentence.clips[0])
      assert [len(clip) for clip in sentence.clips] != [1] * 4 or any(
        np.array_equal(swapped.clips[1], other.clips[1]) and other.task != sentence.task for other in sentences
      )

  def test_swapped_pairs_of_another_size_are_resized(self):
    """The other sentence's are grey and white, twice as large and longer than this one's black ones."""
    sizes = (5, 16, 0), (9, 32, 100), (9, 32, 255)
    own, *others = (np.full((count, side, 2 * side, 3), level, np.uint8) for count, side, level in sizes)
    sentences = [Sentence(clips=clips, roles=reference_roles(4)) for clips in ((own,) * 4, (*others, own, own))]
    swapped = replace_pairs(*sentences).clips
    assert [clip.shape for clip in swapped] == [own.shape] * 4
    assert [int(clip.mean()) for clip in swapped] == [100, 255, 0, 0]

  def test_without_another_task_pairs_are_of_a_computed_task(self, tiny_config):
    cases = [Case("x", "II", 4), Case("x", "I", 4), Case("y", "I", 6)]
    assert choose_other_tasks(cases, np.random.default_rng(0)) == [None, None, None]
    planned = [each for each in select(tiny_config) if each.case.task == "invert"]
    others = [read() for read in plan_other_pairs(tiny_config, planned)]
    assert [other.task for other in others] == ["swap_channels"] * len(planned)

  def test_codec_round_trip_is_close(self, tiny_config):
    truth = select(tiny_config)[0].read().clips[-1]
    assert psnr(round_trip(random_pipeline(tiny_config, make_mesh({"data": -1})), truth), truth) > 20

  def test_pairs_of_the_inverse_task_keep_the_query(self, tiny_config):
    sentence = select(tiny_config)[0].read()
    a, a2, b, b2 = sentence.clips
    assert all(x is y for x, y in zip(show_inverse_task(sentence).clips, (a2, a, b, b2)))


@pytest.fixture(scope="module")
def results(tiny_config, tmp_path_factory):
  """(config, eval.json, PSNR of each sentence in quick mode, report.json) of one pipeline."""
  folder = tmp_path_factory.mktemp("modes")
  config = override(tiny_config, {"eval.batch_size": 3})
  pipeline = random_pipeline(config, make_mesh({"data": -1}))
  quick_scores, score_psnr = [], run.score_psnr

  def score_and_keep(generated):
    quick_scores.append(score_psnr(generated))
    return quick_scores[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run, "score_psnr", score_and_keep)
    run.evaluate_quick(pipeline, config, folder)
  run.evaluate(pipeline, config, data=open_data(config), folder=folder / "evaluation", origin=ORIGIN)
  assert image_width(folder / "grid.png") > 500 and image_width(folder / "grid.webp") > 500
  shown = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "evaluation" / "report.md").read_text())
  assert shown == ["grid.png", "grid.webp", "curves.png"]
  quick, full = (json.loads((folder / name).read_text()) for name in ("eval.json", "evaluation/report.json"))
  return config, quick, quick_scores, full


@pytest.mark.parametrize(
  "tasks, kinds, expected",
  [
    (["invert", "duotone reversed"], {}, []),
    (["scribble"], {}, ["scribble"]),
    (["my_edges", "Depth"], {"my_edges": "edges"}, ["depth", "edges (BIPED)", "depth (NYUv2)", "depth (NYUv2)"]),
    (["mine", "camera_movement"], {"mine": "normals", "other": "depth"}, ["camera", "normals (NYUv2)"]),
  ],
)
def test_published_results_are_those_of_the_tasks(tasks, kinds, expected):
  data = {"tfds": {"task": "other", "kind": "image"}, "kinds": kinds}
  lines = report._published_section({"by_task": dict.fromkeys(tasks), "config": {"data": data}})
  rows = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
  assert [row for row in rows if row] == expected and bool(lines) == bool(expected)


class TestModes:
  def test_quick_and_full_agree(self, results):
    config, quick, quick_scores, full = results
    assert len(quick_scores) == len(full["sentences"]) == len(select(config))
    for scores, sentence in zip(quick_scores, full["sentences"]):
      assert scores.keys() == {*QUICK_KEYS.values()}
      assert scores == {name: sentence["scores"][name]["psnr"] for name in scores}
    groups = [(quick["overall"], full["overall"])]
    for part in ("by_task", "by_context"):
      assert quick[part].keys() == full[part].keys()
      groups += [(quick[part][name], full[part][name]) for name in quick[part]]
    for means, rows in groups:
      assert means == {key: round(rows[name]["psnr"], 3) for key, name in QUICK_KEYS.items()} | {
        "count": rows["prediction"]["count"]
      }

  def test_quick_report_averages_its_sentences(self, results):
    config, quick, quick_scores, full = results
    assert quick["seed"] == 0 and quick["steps"] == 4
    assert set(quick["by_task"]) == {task for task, weight in config.data.tasks.items() if weight}
    assert set(quick["by_context"]) == {"I", "II", "III", "IV"}
    assert quick["overall"]["count"] == len(quick_scores) == sum(m["count"] for m in quick["by_task"].values())
    images = [
      scores["prediction"] for scores, sentence in zip(quick_scores, full["sentences"]) if sentence["context"] == "II"
    ]
    assert quick["image"]["psnr"] == pytest.approx(np.mean(images), abs=1e-3) and quick["image"]["count"] == len(images)
    assert quick["overall"]["psnr_codec"] > 30
    assert quick["held_out_pairs"] <= len(quick_scores)

  @pytest.mark.parametrize(
    "name, value, message",
    [
      ("config", {}, "config must be a RunConfig, got dict: univid_jax.config.presets has some"),
      ("pipeline", None, "pipeline must be a Pipeline, got NoneType: univid_jax.load_pipeline returns one"),
      ("folder", None, "folder must name a folder or a bucket, got None"),
      ("data", {}, "data must be a DataSources, got dict: open_data of univid_jax.data.sources.open"),
      ("origin", None, r"origin must be an Origin, got NoneType: univid_jax.checkpoints.origin.Origin.resolve\(CHECKP"),
      ("accelerated", "x", "accelerated must be a Pipeline, got str"),
    ],
  )
  def test_wrong_arguments(self, tiny_config, tmp_path, name, value, message):
    pipeline, data = random_pipeline(tiny_config, make_mesh({"data": -1})), open_data(tiny_config)
    arguments = {"pipeline": pipeline, "config": tiny_config, "data": data, "folder": tmp_path / "out"} | {name: value}
    with unchecked(), pytest.raises(UserError, match=message):
      run.evaluate(**{"origin": ORIGIN} | arguments)
    if name not in ("origin", "accelerated"):
      with unchecked(), pytest.raises(UserError, match=message):
        run.evaluate_quick(**arguments)
    assert not list(tmp_path.iterdir())

  def test_nothing_held_out(self, tiny_config, tmp_path):
    config = override(tiny_config, {"eval.sentences_per_case": 0})
    pipeline = random_pipeline(config, make_mesh({"data": -1}))
    assert run.evaluate_quick(pipeline, config, tmp_path) is None and not (tmp_path / "eval.json").exists()
    with pytest.raises(UserError, match=r"there is nothing to evaluate on: config\.eval\.sentences_per_case is 0$"):
      run.evaluate(pipeline, config, data=open_data(config), folder=tmp_path, origin=ORIGIN)


def test_too_few_records_to_hold_any_out_are_counted(tmp_path):
  """Three pairs of each of two tasks at 5 %."""
  config = override(tiny(), {"data.pairs": str(write_pairs(tmp_path)), "data.num_frames": 5})
  text = run.nothing_held_out(config, open_data(config))
  assert text.startswith("there is nothing to evaluate on: 3 records of a task are too few to hold any out at ")
  assert "config.data.held_out = 0.05, which takes 20: train with --config.data.held_out=0.34, which holds out" in text
  held_out = open_data(override(config, {"data.held_out": 0.34})).held_out
  assert len({record.name for record in held_out["pairs"].queries}) == 1
  text = run.nothing_held_out(override(config, {"data.held_out": 0.0}), open_data(config))
  assert "config.data.held_out is 0, and there is no test set" in text


def test_cases_are_counted_as_sentences_per_case_counts_them(tmp_path):
  """Splits of grids are cases of their own; pairs of a task are one case, whatever their contexts."""
  one = {"data.contexts": {"II": 1.0}, "eval.sentences_per_case": 1}
  families = {name: float(name == "recolor") for name in grids().data.grids.families}
  config = override(grids(), one | {"data.grids.families": families})
  assert run._announce(config, select(config)).startswith(
    "evaluating 2 sentences, at most 1 of each of 2 cases (task, context, number of clips, split of grids; "
  )
  pairs = {"data.pairs": str(write_pairs(tmp_path)), "data.num_frames": 5, "data.held_out": 0.34}
  config = override(tiny(), pairs | {"eval.sentences_per_case": 8})
  sentences = select(config)
  assert len({sentence.case for sentence in sentences}) > 2
  assert "evaluating 16 sentences, at most 8 of each of 2 cases (" in run._announce(config, sentences)


@pytest.mark.parametrize(
  "name, shown", [("psnr", ["16.03", "11.80", "6.82"]), ("ssim", ["16.0340", "11.8000", "6.8180"])]
)
def test_the_numbers_of_a_column_have_the_same_decimals(name, shown):
  assert [report._cell({name: value}, name) for value in (16.034, 11.8, 6.818)] == shown


def test_variants_of_a_pair_are_one_pair():
  """Whatever their direction and number of frames."""
  rng = np.random.default_rng(0)
  b, b2, other = rng.integers(0, 256, (3, 5, 4, 4, 3), np.uint8)

  def pair(*clips):
    return Generated(SentenceInfo("task", "I", 4, [5] * 4, "", False, None), clips, other, {}).pair

  assert pair(other, other, b, b2) == pair(b, b, b2[:1], b[:1]) != pair(b, b2, other, b2)
  few = {"held_out_pairs": 1}
  assert report.describe_count(few, 16) == "16 sentences of 1 held-out pair"
  assert report.describe_count(few, 1) == "1 sentence"


class TestSamplesFolder:
  def test_only_what_changes_samples_matters(self, tiny_config, tmp_path):
    def open_folder(config=tiny_config, origin=ORIGIN):
      return open_samples_folder(epath.Path(tmp_path), config, select(config), origin, write=True)

    folder = open_folder()
    assert folder == open_folder(override(tiny_config, {"eval.depth_alignment": "median", "data.num_threads": 2}))
    assert folder == open_folder(override(tiny_config, {"flow.shift": 3.0, "model.dtype": "bfloat16"}))
    assert folder == open_folder(override(tiny_config, {"data.prompt_dropout": 0.5})), "held-out prompts are kept"
    assert folder == open_folder(origin=fixed_origin(checkpoint="elsewhere", step=9))
    changes = {"data.height": 32, "data.fps": 12.0, "eval.seed": 9, "eval.num_inference_steps": 3}
    folders = [folder, open_folder(origin=fixed_origin("f00"))]
    folders += [open_folder(override(tiny_config, {key: value})) for key, value in changes.items()]
    assert len(set(folders)) == len(folders)
    described = json.loads((folders[1] / "origin.json").read_text())
    assert described["weights"] == {"trained": "f00"} and described["origin"]["checkpoint"] == "random"

  def test_other_data_gives_other_samples(self, tiny_config, tmp_path):
    folders = []
    for shade in (0, 100):
      for name in ("a", "b"):
        for side in ("source", "target"):
          path = tmp_path / "pairs" / "edges" / name / f"{side}.png"
          path.parent.mkdir(parents=True, exist_ok=True)
          write_image(path, shade=shade)
      config = override(tiny_config, {f"data.{key}": str(tmp_path / "pairs") for key in ("pairs", "test_pairs")})
      folders.append(open_samples_folder(epath.Path(tmp_path), config, select(config), ORIGIN, write=False))
    assert folders[0] != folders[1]

  def test_other_files_of_a_test_folder_give_other_samples(self, tiny_config, tmp_path):
    folders = []
    for shade in (0, 0, 100):
      (tmp_path / "clips").mkdir(exist_ok=True)
      write_image(tmp_path / "clips" / "a.png", shade=shade)
      config = override(tiny_config, {"data.test_folder": str(tmp_path / "clips")})
      folders.append(open_samples_folder(epath.Path(tmp_path), config, select(config), ORIGIN, write=False))
    assert folders[0] == folders[1] != folders[2]

  def test_other_arrays_give_other_samples(self):
    """Of a source of one's own, whose clips need no keys."""
    clips = [np.full((1, 8, 8, 3), shade, np.uint8) for shade in (0, 0, 1)]
    found = [_plan(Sentence(clips=(clip,) * 4, roles=reference_roles(4)), ("", 0)).identify() for clip in clips]
    assert found[0] == found[1] != found[2]


def test_an_evaluation_is_that_of_a_step_and_of_options(tiny_config, tmp_path):
  assert not is_evaluated(tiny_config, tmp_path)
  report = {"steps": tiny_config.num_steps, "eval": json.loads(json.dumps(to_json(tiny_config)["eval"]))}
  for written, expected in ((report, True), ({"steps": tiny_config.num_steps}, False), ([], False)):
    (tmp_path / "eval.json").write_text(json.dumps(written))
    assert is_evaluated(tiny_config, tmp_path) == expected
  (tmp_path / "eval.json").write_text(json.dumps(report))
  for changes in ({"num_steps": 5}, {"eval.sentences_per_case": 3}):
    assert not is_evaluated(override(tiny_config, changes), tmp_path)


def test_figures(tmp_path):
  plot_loss(tmp_path / "loss.png", [(1, 3.0), (2, 2.0), (3, 1.0)], [(3, 2.0)])
  image, video = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((5, 8, 8, 3), np.uint8)
  sentence_grid(tmp_path / "grid.png", [("task\ncontext IV", (image, video, image, video, video))])
  assert (tmp_path / "loss.png").stat().st_size > 1000 and (tmp_path / "grid.png").stat().st_size > 500


def test_a_point_of_few_steps_is_no_spike():
  """Stopped at step 25 and resumed: that point is a mean over 5 steps, the next one over the other 5."""
  points = [(10, 3.0), (20, 2.0), (25, 9.0), (30, 1.0), (40, 2.0)]
  assert join_short(points) == [(10, 3.0), (20, 2.0), (30, 5.0), (40, 2.0)]
  assert join_short(points[:3]) == points[:3] and join_short(points[:1]) == points[:1]


def test_one_point_can_be_seen(tmp_path):
  plot_loss(tmp_path / "loss.png", [(10, 2.0)])
  colors = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
  assert (np.abs(colors.astype(int) - (31, 119, 180)).sum(axis=1) < 10).sum() > 150, "more than the line of the legend"


@pytest.mark.parametrize("names", [("дом", "кот"), ("ώρα", "φως"), ("größe", "grüße")])
def test_labels_may_have_other_letters_than_ascii(tmp_path, names):
  """In Pillow's own font they are all the same box."""
  image = np.zeros((1, 8, 8, 3), np.uint8)
  for name in names:
    sentence_grid(tmp_path / f"{name}.png", [(name, (image,) * 5)])
  first, second = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in names)
  assert (first < 128).any() and (first.shape != second.shape or (first != second).any())


def shades(picture, *, row=0):
  """Returns the grey of each tile in a row of a grid whose labels are empty."""
  line = np.asarray(picture.convert("L"), int)[HEADER + row * (TILE + GAP) + TILE // 2]
  starts = np.flatnonzero((line < 250) & (np.roll(line, 1) >= 250))  # of the lines around them
  return [line[start + TILE // 2] for start in starts]


def test_an_animation_has_all_frames(tmp_path):
  """Clips that are shorter stay at their last frame."""
  image = np.full((1, 8, 8, 3), 60, np.uint8)
  video = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 200)])
  short = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (20, 160)])
  rows = [("", (image, video, image, short, video))]
  sentence_animation(tmp_path / "grid.webp", rows, fps=10)
  with Image.open(tmp_path / "grid.webp") as animation:
    assert animation.n_frames == 3 and animation.info["loop"] == 0
    for time, expected in enumerate(([60, 0, 60, 20, 0], [60, 100, 60, 160, 100], [60, 200, 60, 160, 200])):
      animation.seek(time)
      np.testing.assert_allclose(shades(animation), expected, atol=4)
      assert animation.info["duration"] == (1100 if time == 2 else 100)


def test_an_animation_of_long_videos_skips_frames(tmp_path):
  video = np.zeros((81, 8, 8, 3), np.uint8) + 3 * np.arange(81, dtype=np.uint8)[:, None, None, None]
  sentence_animation(tmp_path / "grid.webp", [("", (video,) * 5)], fps=16)
  with Image.open(tmp_path / "grid.webp") as animation:
    assert animation.n_frames == 27
    animation.seek(1)
    np.testing.assert_allclose(shades(animation), [9] * 5, atol=4)
    assert animation.info["duration"] == round(3000 / 16)


def test_the_gallery_shows_every_task_before_it_repeats_one(tmp_path, monkeypatch, caplog):
  """And no more rows than a newcomer reads; the log says how many are left out."""
  drawn = []
  monkeypatch.setattr(report, "sentence_grid", lambda path, rows, **options: (path.touch(), drawn.extend(rows)))
  gallery, frames = report.Gallery(), np.zeros((1, 8, 8, 3), np.uint8)
  for context in ("I", "II", "III"):
    for task in ("a", "b", "c", "d"):
      example = as_generated(frames, task=task)
      gallery.add(dataclasses.replace(example, info=dataclasses.replace(example.info, context=context)))
  with caplog.at_level(logging.INFO):
    gallery.draw(epath.Path(tmp_path), with_swapped=False, fps=0.0)
  assert "grid.png shows 8 of 12 combinations of task and context; not " in caplog.text
  labels = [label.split("\n")[:2] for label, _ in drawn]
  assert labels == [[task, f"context {context}"] for task in "abcd" for context in ("I", "II")]


@pytest.mark.parametrize(
  "arriving, shown",
  [
    ([("a", range(32))], [("a", range(8))]),
    ([("a", [0, 0, 1])], [("a", range(2))]),
    ([("a", range(32)), ("b", range(32))], [("a", range(4)), ("b", range(4))]),
    ([("a", [0]), ("b", range(9)), ("c", [0, 1])], [("a", [0]), ("b", range(5)), ("c", [0, 1])]),
    ([(task, range(2)) for task in "abcdefghij"], [(task, [0]) for task in "abcdefgh"]),
  ],
)
def test_the_gallery_shows_more_sentences_of_few_tasks(tmp_path, monkeypatch, arriving, shown):
  """Each with another B; the tasks share the rows."""
  drawn = []
  monkeypatch.setattr(report, "sentence_grid", lambda path, rows, **options: (path.touch(), drawn.extend(rows)))
  gallery = report.Gallery()
  for task, shades in arriving:
    for shade in shades:
      gallery.add(as_generated(np.full((1, 8, 8, 3), shade, np.uint8), task=task))
  gallery.draw(epath.Path(tmp_path), with_swapped=False, fps=0.0)
  rows = [(label[0], clips[2].max()) for label, clips in drawn]
  assert rows == [(task, shade) for task, shades in shown for shade in shades]


def test_white_frames_have_an_outline(tmp_path):
  white = np.full((1, 8, 8, 3), 255, np.uint8)
  sentence_grid(tmp_path / "grid.png", [("", (white,) * 5)])
  line = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))[HEADER + TILE // 2]
  edges = np.flatnonzero(line < 255)
  assert len(edges) == 10 and (np.diff(edges)[::2] == TILE + 1).all()


def test_the_gallery_animates_videos_alone(tmp_path, monkeypatch):
  """Of what it shows; an animation of an earlier evaluation is deleted."""
  drawn = []
  monkeypatch.setattr(report, "sentence_animation", lambda path, rows, **options: (path.touch(), drawn.append(rows)))
  image, video = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
  gallery = report.Gallery()
  gallery.add(as_generated(image, task="still"))
  (tmp_path / "grid.webp").touch()
  gallery.draw(epath.Path(tmp_path), with_swapped=False, fps=0.0)
  assert not (tmp_path / "grid.webp").exists() and not drawn
  gallery.add(as_generated(video, task="moving"))
  gallery.draw(epath.Path(tmp_path), with_swapped=False, fps=0.0)
  assert (tmp_path / "grid.webp").exists() and [label.split("\n")[0] for label, _ in drawn[0]] == ["moving"]


def config_with(**options):
  return override(
    tiny(),
    {"data.depth_range": (1.0, 5.0), "eval.depth_alignment": "none"}
    | {f"eval.{name}": value for name, value in options.items()},
  )


def as_generated(truth, params=None, reverse=False, task="t"):
  info = SentenceInfo(
    task=task, context="II", num_clips=4, num_frames=[1] * 4, prompt="", reverse=reverse, params=params
  )
  return Generated(info, [truth] * 4, truth, {"prediction": truth})


def score_kind(kind, clip, truth, **options):
  """Returns the metrics and counts of a kind."""
  return KIND_METRICS[kind].score(clip, as_generated(truth), KindOptions.from_config(config_with(**options)))


class TestKinds:
  def test_every_kind_has_metrics(self):
    assert set(KIND_METRICS) == set(TargetKind) - {TargetKind.IMAGE}

  def test_depth(self):
    truth = np.full((1, 4, 4, 3), 255, np.uint8)
    truth[:, :2] = 127
    truth[:, 3] = 0  # unknown
    found, _ = score_kind(TargetKind.DEPTH, truth, truth)
    assert found["delta1"] == 1 and found["rmse_m"] == 0
    wrong = truth.copy()
    wrong[:, 2] = 51  # 4.2 m instead of 1 m
    found, _ = score_kind(TargetKind.DEPTH, wrong, truth)
    assert found["abs_rel"] == pytest.approx(3.2 / 3) and found["delta3"] == pytest.approx(2 / 3)

  def test_normals(self):
    vectors = np.random.default_rng(0).normal(size=(1, 5, 5, 3))
    truth = normals_to_image(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    assert score_kind(TargetKind.NORMALS, truth, truth)[0]["mean"] < 1
    wrong = truth.copy()
    wrong[:, 2:] = 255 - wrong[:, 2:]
    assert score_kind(TargetKind.NORMALS, wrong, truth)[0]["mean"] > 90
    truth[:, 2:] = 0  # unknown
    assert score_kind(TargetKind.NORMALS, wrong, truth)[0]["mean"] < 1

  def test_edges_are_what_is_drawn_in_at_least_half_of_the_ink(self):
    truth = np.zeros((1, 16, 16, 3), np.uint8)
    truth[:, 2:14, 3], truth[:, 2:14, 8], truth[:, 2:14, 12] = 255, 128, 120
    _, counts = score_kind(TargetKind.EDGES, truth, truth)
    assert (counts["edges"][:, 2] == 2 * 12).all()

  def test_segmentation_is_pooled(self, tmp_path, sklearn_metrics):
    """Labels are the nearest colours of a palette; over a data set, pixels are counted, not images averaged."""
    colors = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    (tmp_path / "palette.txt").write_text("\n".join(" ".join(map(str, color)) for color in colors))
    palette = str(tmp_path / "palette.txt")
    rng = np.random.default_rng(0)
    truth = colors[rng.integers(0, 3, (1, 6, 6))]
    noisy = np.clip(truth.astype(int) + rng.integers(-20, 21, truth.shape), 0, 255).astype(np.uint8)
    assert score_kind(TargetKind.SEGMENTATION, noisy, truth, palette=palette)[0]["miou"] == 1
    found, _ = score_kind(TargetKind.SEGMENTATION, truth[..., [1, 0, 2]], truth, palette=palette)
    assert found["pixel_accuracy"] < 0.6 and found["pixel_accuracy_matched"] == 1
    one, other = truth.copy(), np.zeros_like(truth)
    one[:, :3] = colors[1]
    kind = TargetKind.SEGMENTATION
    scores = [
      Score("prediction", metrics, kind, counts)
      for metrics, counts in (score_kind(kind, clip, truth, palette=palette) for clip in (one, other))
    ]
    row = Scorer(config_with(palette=palette)).tabulate(scores)["prediction"]
    labels = [nearest_labels(clip, colors).ravel() for clip in (truth, truth, one, other)]
    jaccard = sklearn_metrics.jaccard_score(np.concatenate(labels[:2]), np.concatenate(labels[2:]), average="macro")
    assert row["miou"] == pytest.approx(jaccard)
    assert row["miou"] != pytest.approx(np.mean([score.metrics["miou"] for score in scores]))

  def test_a_void_label_beyond_the_others_does_not_count(self):
    """As of Pascal VOC: 21 labels, and borders of label 255."""
    labels = np.random.default_rng(0).integers(0, 21, (1, 20, 20))
    labels[:, ::7] = 255
    truth = label_colors(labels)
    predicted = truth.copy()
    predicted[:, ::7] = label_colors(np.array(15))
    options = {"num_labels": 21, "void_label": 255}
    assert score_kind(TargetKind.SEGMENTATION, predicted, truth, **options)[0]["miou"] == 1
    predicted[:, 1] = label_colors(np.array(0))
    found, _ = score_kind(TargetKind.SEGMENTATION, predicted, truth, **options)
    known = np.delete(labels[0], [0, 7, 14], axis=0)
    known[1:] = -1
    assert found["pixel_accuracy"] == pytest.approx(1 - np.sum(known[0] != 0) / (17 * 20))

  @pytest.mark.parametrize("key, value", [("num_labels", 257), ("void_label", 256)])
  def test_labels_that_the_palette_lacks(self, key, value):
    with pytest.raises(UserError, match=rf"config\.eval\.{key} = {value}, but the palette has 256 colours"):
      KindOptions.from_config(override(config_with(**{key: value}), {"data.kinds": {"rooms": "segmentation"}}))
    KindOptions.from_config(config_with(**{key: value}))  # without labels they do not matter

  def test_metres_are_not_levels_of_grey(self):
    """RMSE of depth does not replace that of the image, which is averaged over all tasks."""
    truth = np.full((1, 16, 16, 3), 100, np.uint8)
    generated = dataclasses.replace(as_generated(truth, task="rooms"), samples={"prediction": truth + np.uint8(51)})
    scorer = Scorer(override(config_with(), {"data.kinds": {"rooms": "depth"}}))
    (found,) = (score for score in scorer(generated) if score.name == "prediction")
    assert found.metrics["rmse"] == 51 and found.metrics["rmse_m"] == pytest.approx(4 * 51 / 255)

  def test_label_maps_with_other_colors_are_an_error(self):
    """TFDS's label maps have the default palette."""
    truth = label_colors(np.random.default_rng(0).integers(0, 256, (1, 6, 6)))
    assert score_kind(TargetKind.SEGMENTATION, truth, truth)[0]["miou"] == 1
    with pytest.raises(
      UserError, match="of the pixels in a label map of task 't' have a colour that is not in the pal"
    ):
      score_kind(TargetKind.SEGMENTATION, truth, truth, num_labels=3)

  def test_reversed_sentences_have_image_metrics_only(self):
    """The target of a reversed scribble is a photograph: it has no edges to be compared."""
    truth = np.zeros((1, 16, 16, 3), np.uint8)
    params = {"paper": (0, 0, 0), "ink": (1, 1, 1)}
    forward, reverse = (as_generated(truth, params, reverse, "scribble") for reverse in (False, True))
    scorer = Scorer(config_with())
    assert "edges" in scorer(forward)[0].counts and not scorer(reverse)[0].counts
    assert (forward.info.label, reverse.info.label) == ("scribble", "scribble reversed")

  def test_own_and_computed_tasks_of_one_name(self):
    """What an own task is called says nothing about its targets; only computed sentences have parameters."""
    truth = np.zeros((1, 16, 16, 3), np.uint8)
    computed, own = (
      as_generated(truth, params, task="scribble") for params in ({"paper": (0, 0, 0), "ink": (1, 1, 1)}, None)
    )
    for kinds, expected in (({}, TargetKind.IMAGE), ({"scribble": "depth"}, TargetKind.DEPTH)):
      scorer = Scorer(override(tiny(), {"data.kinds": kinds}))
      assert scorer(computed)[0].kind == TargetKind.EDGES and scorer(own)[0].kind == expected
    for task in ("outline", "maze", "arc"):
      assert not score_grids(as_generated(truth, task=task), {}, Rendering.from_config(tiny().data))

  def test_salient_objects_have_the_colours_of_their_sentence(self):
    """Black on white, where a white object on black would be the opposite."""
    truth = np.full((1, 8, 8, 3), 255, np.uint8)
    truth[:, 2:5, 2:5] = 0
    colors = {"background": (1, 1, 1), "object_color": (0, 0, 0)}
    empty, options = np.full_like(truth, 255), KindOptions.from_config(config_with())
    score = KIND_METRICS[TargetKind.SALIENCY].score
    for clip, f_measure in ((truth, 1), (empty, 0)):
      metrics, _ = score(clip, as_generated(truth, colors, task="salient_object"), options)
      assert metrics["f_measure"] == pytest.approx(f_measure, abs=1e-6)

  def test_unmix_colors(self):
    clip = np.array([[0, 0, 0], [255, 255, 255], [51, 51, 51]], np.uint8)
    np.testing.assert_allclose(unmix_colors(clip, (0, 0, 0), (1, 1, 1)), [0, 1, 0.2], atol=1e-6)


class TestTables:
  def test_only_defined_values_count(self):
    rows = Scorer(config_with()).tabulate(
      [Score("prediction", {"psnr": 10.0, "x": float("nan")}), Score("prediction", {"psnr": 20.0, "x": 3.0})]
    )
    assert rows == {"prediction": {"psnr": 15.0, "x": 3.0, "count": 2}}

  def test_repetitions_become_a_deviation(self):
    scores = [Score("prediction", {"psnr": 10.0}), Score("seed_1", {"psnr": 12.0}), Score("swapped", {"psnr": 5.0})]
    rows = Scorer(config_with()).tabulate(scores)
    assert rows.keys() == {"prediction", "swapped"} and rows["swapped"] == {"psnr": 5.0, "count": 1}
    assert rows["prediction"] == {"psnr": 11.0, "psnr_std": pytest.approx(2**0.5), "count": 1}


def test_the_noise_of_a_sentence_depends_on_its_number():
  """Sentences of other lengths, which are sampled apart, change nothing."""
  frames, found = {n: np.zeros((n, 16, 16, 3), np.uint8) for n in (1, 5)}, []

  class Stub:
    def sample_batch(self, batch, *, num_frames, seeds, **_):
      found.append((num_frames, seeds))
      return []

  sentences = {k: Sentence(clips=(frames[n],) * 4, roles=reference_roles(4)) for k, n in ((0, 1), (1, 5), (2, 1))}
  sample_targets(Stub(), sentences, num_inference_steps=1, first_seed=7)
  assert found == [(1, [7, 9]), (5, [8])]
