"""The demo page's server side, without a browser: what it samples, shows and offers. See also test_demo.py."""

import dataclasses
import inspect
import logging
import shlex
import threading
import types
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import random_pipeline
from tests.typecheck import unchecked
from univid_jax import sample
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run import RunRecord, write_run
from univid_jax.cli import page_session
from univid_jax.cli.page_examples import EXAMPLES
from univid_jax.cli.page_messages import short_paths
from univid_jax.cli.page_pictures import arrange, enlarge, read_grid, show_key_frames, subtract
from univid_jax.cli.page_prompts import offered_tasks
from univid_jax.cli.page_session import Choice, FinishedSample, Offer, Session, Status, find_checkpoints
from univid_jax.cli.sample_command import SampleCommand
from univid_jax.codecs.dct import DCTCodec
from univid_jax.core.errors import UserError
from univid_jax.core.pixels import to_float
from univid_jax.data.media.reader import read_clip
from univid_jax.data.media.writer import write_clip
from univid_jax.data.pictures import concatenate_clips
from univid_jax.inference import preview
from univid_jax.inference.preview import apply_colors, fit_colors
from univid_jax.inference.sampler import extrapolate
from univid_jax.parallel.mesh import make_mesh

OFFER = Offer(
  checkpoints=("runs/one", "runs/two"),
  loras=(("a.safetensors", 1.0), ("b.safetensors", 0.5)),
  distillation=("fast.safetensors:0.8",),
  flags=("--dtype=float32",),
)


class NamedOrigin(Origin):
  """Of weights that are in no file."""

  def to_json(self):
    return {"checkpoint": self.checkpoint}


@pytest.fixture(scope="module")
def pipeline(tiny_config):
  return random_pipeline(tiny_config, make_mesh({"data": 1}, jax.devices()[:1]))


@pytest.fixture
def session(pipeline, monkeypatch):
  """A session whose models are all the same, with the names of those that were loaded."""
  loaded = []

  def load(command):
    loaded.append(command.sampling.checkpoint.value)
    return pipeline, NamedOrigin(checkpoint=loaded[-1])

  monkeypatch.setattr(SampleCommand, "load", load)
  monkeypatch.setattr(page_session, "PREVIEW_SECONDS", 0)
  session = Session(Offer(checkpoints=("runs/it's one", "runs/two")))
  session.open(session.first_choice())
  return session, loaded


@pytest.fixture
def clips(tmp_path):
  names = ("first, picture.PNG", "a2.png", "b.png")
  rng = np.random.default_rng(0)
  for name in names:
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / name)
  return [str(tmp_path / name) for name in names]


def folder_in(path: Path, name: str = "new") -> Path:
  (path / name).mkdir()
  return path / name


def test_choices_become_the_flags_of_sample():
  first = Session(OFFER).first_choice()
  assert first.model_flags(OFFER) == [
    "--checkpoint=runs/one", "--dtype=float32", "--lora=a.safetensors,b.safetensors:0.5",
    "--accelerate=fast.safetensors:0.8",
  ]  # fmt: skip
  assert first.sample_flags() == ["--seed=0"], "the distillation decides about the steps"
  other = Choice(checkpoint="runs/two", lora_weights=(0, -0.25), steps=7, task="depth map", num_frames=5, seed=3)
  assert other.model_flags(OFFER) == ["--checkpoint=runs/two", "--dtype=float32", "--lora=b.safetensors:-0.25"]
  skipping = dataclasses.replace(OFFER, flags=["--lora_skip_unmatched"])
  assert [len(choice.model_flags(skipping)) for choice in (first, dataclasses.replace(other, lora_weights=(0, 0)))] == [
    4,
    1,
  ]
  assert other.sample_flags() == ["--task=depth map", "--steps=7", "--num_frames=5", "--seed=3"]
  both = Choice(checkpoint="runs/one", task="depth map", prompt="--help 'me', now")
  assert both.sample_flags() == ["--prompt=--help 'me', now", "--seed=0"]
  with pytest.raises(UserError, match="choose one of the checkpoints runs/one, runs/two, not '/etc'"):
    Choice(checkpoint="/etc").model_flags(OFFER)


def test_only_tasks_whose_prompts_a_model_knows_are_offered(checkpoint, monkeypatch):
  """Not those of others, nor any to models that take no prompts."""
  assert offered_tasks(["small"], {"invert": ""}) is None and offered_tasks([checkpoint], {}) is None
  monkeypatch.setattr("univid_jax.checkpoints.pretrained.PretrainedCheckpoint.has", lambda self, name: True)
  assert offered_tasks([checkpoint], {"my_task": "Do it.", "other": ""}) == ["my task"]
  known = offered_tasks([checkpoint], {})
  assert known and {"depth map", "invert", "colorization"} <= set(known) and len(known) == len(set(known)) < 30
  assert not {"negative", "colour version"} & set(known), "other names of the same prompts"
  assert offered_tasks(["/missing"], {}) == known
  assert offered_tasks([checkpoint, "/missing"], {"my_task": "Do it."})[:1] == ["my task"]


def test_messages_name_clips_without_the_folders_of_the_page(tmp_path, monkeypatch):
  lines = []
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  monkeypatch.setattr(logging.getLogger("univid_jax"), "handlers", [handler])
  log = logging.getLogger("univid_jax.test")
  with short_paths(tmp_path):
    log.warning("%s: resized; not %s", tmp_path / "tmpx" / "A.png", "/other/B.png")
  log.warning("%s", tmp_path / "tmpx" / "A.png")
  assert lines == ["A.png: resized; not /other/B.png", f"{tmp_path / 'tmpx' / 'A.png'}"]


def test_errors_of_the_page_are_one_line_and_its_parameters_have_names(session, tmp_path, caplog):
  gr = pytest.importorskip("gradio")
  from univid_jax.cli import page

  upload = gr.File(file_types=["image", "video"])
  page._shorten_errors(upload)
  (tmp_path / "bad.png").write_text("no image")
  shown = page.Page(session[0], tmp_path)
  for wrong in (
    lambda: next(shown._sample(None, None, None)),
    lambda: next(shown._show_clip(str(tmp_path / "bad.png"))),
    lambda: upload.preprocess(gr.FileData(path=__file__)),
  ):
    caplog.clear()
    with pytest.raises(gr.Error) as caught:
      wrong()
    assert not caught.value.print_exception and str(tmp_path) not in caught.value.message
    assert caplog.messages == [f"shown on the page: {caught.value.message}"]
  named = page._name_parameters(lambda *values: iter(values), ["a", "seed"])
  assert list(inspect.signature(named).parameters) == ["a", "seed"] and list(named(1, 2)) == [1, 2]


def test_a_sample_and_the_command_that_reproduces_it(session, clips, tmp_path, monkeypatch, capfd):
  session, loaded = session
  folder = folder_in(tmp_path)
  choice = Choice(checkpoint="runs/it's one", steps=3, seed=4)
  *statuses, result = session.sample(choice, clips, folder)
  assert isinstance(result, FinishedSample) and all(isinstance(status, Status) for status in statuses)
  assert [status.text.partition(",")[0] for status in statuses] == [
    "Reading the clips", "Step 1 of 3", "Step 2 of 3", "Step 3 of 3",
  ]  # fmt: skip
  pictures = [status.picture for status in statuses[1:]]
  large = read_clip(result.large).frames
  assert all(picture.shape == (512, 512, 3) for picture in pictures) and large.shape == (1, 512, 512, 3)
  assert np.array_equal(pictures[-1], large[0]), "the last estimate is the result"
  assert not np.array_equal(pictures[0], pictures[1])
  assert result.text.startswith("B': image of 16 x 16, sampled in ")
  assert read_clip(result.pairs).frames.shape == (1, 520, 520, 3)
  query, sampled = (read_clip(folder / name).frames.astype(int) for name in ("B2_grid.png", "B2.png"))
  difference = np.abs(sampled - query[:, :, 40:56]).astype(np.uint8)
  assert np.array_equal(read_clip(result.difference).frames, enlarge(difference))

  unpacked = folder_in(tmp_path, "unpacked")
  with zipfile.ZipFile(result.bundle) as bundle:
    bundle.extractall(unpacked)
  assert {path.name for path in unpacked.iterdir()} == {
    "A.png", "A2.png", "B.png", "B2.png", "B2.json", "B2_grid.png", "sample.sh",
  }  # fmt: skip
  first = (unpacked / "B2.png").read_bytes()
  (unpacked / "B2.png").unlink()
  assert (unpacked / "sample.sh").read_text() == f"#!/bin/sh\n{result.command}\n"
  monkeypatch.chdir(unpacked)
  name, *arguments = shlex.split(result.command)
  assert name == "univid-sample" and sample.main([name, *arguments]) == 0
  assert (unpacked / "B2.png").read_bytes() == first
  assert loaded == ["runs/it's one", "runs/it's one"], "the session loads a model once"


def test_one_model_at_a_time_and_errors(session, clips, tmp_path):
  session, loaded = session
  two = Choice(checkpoint="runs/two", steps=1)
  first, *_ = session.sample(two, clips, folder_in(tmp_path))
  assert first == Status("Loading the model") and loaded == ["runs/it's one", "runs/two"]
  with pytest.raises(UserError, match="--task=nonsense is not known"):
    list(session.sample(Choice(checkpoint="runs/two", task="nonsense"), clips, folder_in(tmp_path, "task")))
  with pytest.raises((UserError, OSError), match=r"cannot read .*B\.png"):
    (tmp_path / "text.png").write_text("no image")
    list(session.sample(two, [*clips[:2], str(tmp_path / "text.png")], folder_in(tmp_path, "broken")))


def test_what_nobody_waits_for_is_stopped(session, clips, tmp_path):
  session, _ = session
  before = threading.active_count()
  running = session.sample(Choice(checkpoint="runs/it's one", steps=100), clips, folder_in(tmp_path))
  while not next(running).text.startswith("Step 2 "):
    pass
  running.close()
  assert threading.active_count() == before and not (tmp_path / "new" / "B2.png").exists()


def test_whole_videos_report_their_steps(session, tmp_path):
  session, _ = session
  frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
  for name, count in (("a.mp4", 5), ("b.mp4", 9)):
    write_clip(tmp_path / name, frames[:count], fps=8)
  videos = [str(tmp_path / name) for name in ("a.mp4", "a.mp4", "b.mp4")]
  *statuses, result = session.sample(Choice(checkpoint="runs/it's one", steps=2), videos, folder_in(tmp_path))
  assert statuses[-1].text.startswith("Step ") and result.text.startswith("B': video of 9 frames of 16 x 16")
  assert all(path.suffix == ".mp4" for path in (result.large, result.pairs, result.difference))
  assert len(read_clip(result.pairs).frames) == 9


def test_clips_are_shown_as_the_model_sees_them(session, clips, tmp_path):
  session, _ = session
  shown = session.show(clips[0], tmp_path)
  assert shown.suffix == ".png" and read_clip(shown).frames.shape == (1, 256, 256, 3)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_examples(example, tmp_path):
  paths = example.write(tmp_path, size=(24, 32), num_frames=5)
  clips, again = [read_clip(path).frames for path in paths], example.draw((24, 32), 5)
  is_video = example.title.endswith("of a video")
  assert {clip.shape for clip in clips} == {(5 if is_video else 1, 24, 32, 3)}
  assert abs(clips[0].astype(int) - clips[1]).mean() > 5, "the task is seen"
  if not is_video:
    assert all(np.array_equal(clip, other) for clip, other in zip(clips, again))
  assert example.thumbnail().shape == (96, 3 * 96 + 8, 3)


def test_views():
  clips = [np.full((2, 4, 6, 3), value, np.uint8) for value in (10, 20, 30, 25)]
  assert np.all(subtract(clips) == 5)
  view = arrange(clips)
  assert view.shape == (2, 2 * 4 * 43 + 8, 2 * 6 * 43 + 8, 3) and view[0, -1, -1, 0] == 25 and view[0, -1, 0, 0] == 30
  assert show_key_frames(clips[0]).shape == (4 * 85, 2 * 6 * 85, 3)
  assert enlarge(np.zeros((1, 600, 400, 3), np.uint8)).shape == (1, 600, 400, 3)


def test_grids_are_taken_apart(tmp_path):
  clips = [np.full((1, 4, 6, 3), value, np.uint8) for value in (10, 20, 30, 40)]
  write_clip(tmp_path / "grid.png", concatenate_clips(clips))
  found, _ = read_grid(tmp_path / "grid.png", 1)
  assert all(np.array_equal(clip, other) for clip, other in zip(found, clips))


def test_runs_are_found(tmp_path, monkeypatch, tiny_config):
  monkeypatch.chdir(tmp_path)
  assert find_checkpoints() == ["small"]
  for name in ("empty", "trained", "other"):
    (tmp_path / "runs" / name).mkdir(parents=True)
    if name != "other":
      write_run(tmp_path / "runs" / name, RunRecord(tiny_config, ("",), ""))
  (tmp_path / "runs" / "trained" / "checkpoints" / "5" / "model").mkdir(parents=True)
  (tmp_path / "runs" / "notes.txt").write_text("none of these")
  assert find_checkpoints() == ["small", "runs/trained"]


def test_estimates_extrapolate_straight_flows():
  rng = np.random.default_rng(0)
  clean, noise = rng.normal(size=(2, 1, 4, 3)).astype(np.float32)
  levels = np.array([0.9, 0.6, 0.2], np.float32)
  before, after, last = ((1 - level) * clean + level * noise for level in levels)
  assert np.allclose(extrapolate(before, after, levels[:2]), clean, atol=1e-5)
  assert extrapolate(after, last, levels[2:]) is last, "after the last step the level is 0"


@pytest.mark.parametrize("has_weights", [False, True])
def test_what_decodes_cheaply_draws_previews(has_weights, monkeypatch):
  """Any codec that says it has no weights; those of autoencoders would take too long."""
  monkeypatch.setattr(preview, "apply_colors", lambda colors, latents: "colours")
  codec = types.SimpleNamespace(has_weights=has_weights, decode=lambda latents: "decoded")
  with unchecked():
    drawn = preview.DrawnPreview(lambda taken, draw: None, codec, (), None)
    vars(drawn)["_colors"] = None
    assert drawn._draw(np.zeros((1, 2, 2, 3))) == ("colours" if has_weights else "decoded")


def test_colors_are_fitted_to_the_context():
  """The mean colours of what latents encode are nearly linear in the latents of the default codec."""
  codec, rng = DCTCodec(), np.random.default_rng(0)
  clips = [rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2) for count in (1, 1, 5)]
  latents = [codec.encode(to_float(clip)) for clip in clips]
  colors = fit_colors(codec, clips, latents)
  for clip, encoded in zip(clips[:2], latents):
    assert abs(apply_colors(colors, encoded) - to_float(clip)[:, ::4, ::4]).max() < 0.1
  assert apply_colors(colors, latents[2]).shape == (2, 4, 4, 3)
