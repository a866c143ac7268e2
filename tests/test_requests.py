"""Sampling from files: how they are read, what is reported, and what is checked before time is spent."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.clip_files import write_image, write_video
from univid_jax.checkpoints.usage import Usage
from univid_jax.cli.flags import UsageError
from univid_jax.cli.requests import RequestRunner
from univid_jax.cli.sampling import Request, SamplingArguments, check_outputs, choose_format, plan_requests
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit
from univid_jax.core.packed_row import UNIVID_CONTEXT
from univid_jax.data.clips import ClipFormat
from univid_jax.data.media import writer
from univid_jax.data.media.reader import read_clip
from univid_jax.inference.pipeline import Pipeline
from univid_jax.inference.plan import SamplingOptions

TRAINED = ClipFormat(size=(16, 24), num_frames=17, fit=ClipFit.PAD, fps=8.0, buckets=((24, 16),))
AS_TRAINED = dict(size=None, num_frames=None, fit=None, fps=None)


class EchoPipeline(Pipeline):
  """Returns the query, cut or repeated to the length asked for."""

  dtype, attention, context_mode = "float32", "full", UNIVID_CONTEXT
  experts = types.SimpleNamespace(quantize="none")
  usage = Usage(is_known=False)

  def __init__(self):
    self.contexts: list[list[np.ndarray]] = []

  def latent_shape(self, shape):
    return latent_shape(shape, temporal_stride=4, spatial_stride=8)

  def sample_video(self, examples, query, *, carry_context, **options):
    self.carried = carry_context
    steps = types.SimpleNamespace(num_steps=3, num_windows=3)
    frames = query.read(0, query.num_frames)
    self.contexts.append([*examples, frames])
    return type("Video", (list,), vars(steps))([frames])

  def sample(self, clips, *, num_frames, num_inference_steps, progress, **options):
    self.contexts.append(clips)
    progress(num_inference_steps)
    indices = np.arange(num_frames or len(clips[-1])).clip(max=len(clips[-1]) - 1)
    return dataclasses.make_dataclass("Sample", ["frames"])(clips[-1][indices])


def runner(form: ClipFormat = TRAINED, *, num_frames: int | None = None, **options) -> RequestRunner:
  arguments = SamplingArguments(num_frames=num_frames, steps=SamplingOptions(num_inference_steps=2))
  return RequestRunner(EchoPipeline(), form, arguments, {}, **options)


def test_clips_are_read_as_in_training_unless_something_else_is_asked_for():
  assert choose_format(TRAINED, **AS_TRAINED) == TRAINED
  other = choose_format(TRAINED, size=(32, 32), num_frames=33, fit="crop", fps=0.0)
  assert other == ClipFormat(size=(32, 32), num_frames=33)
  assert choose_format(TRAINED, **AS_TRAINED | {"num_frames": 1}).num_frames == 17, "an image of a video"


def test_changes_are_reported_once_and_recorded(tmp_path: Path, caplog):
  image = str(write_image(tmp_path / "a.png", size=(16, 24)))
  video = str(write_video(tmp_path / "v.mp4", 300, size=(36, 24)))  # 8 frames per second
  sampling = runner(dataclasses.replace(TRAINED, fps=4.0), num_frames=17)
  with caplog.at_level("INFO", "univid_jax"):
    for name in ("one", "two"):
      line = sampling.run(Request((image, image, video), tmp_path / name, needs_suffix=True))
      assert line == f"wrote 17 frames of 16 x 24 pixels (width x height): {tmp_path / name}.mp4"
  image_line, video_line = caplog.messages
  changes = ["frames 0 to 16 of 150", "8 resampled to 4 frames per second"]
  assert video_line == f"{video}: {'; '.join([*changes, '24 x 36 resized to 16 x 24 (width x height)'])}"
  assert image_line == f"{image}: 24 x 16 resized to 16 x 24 (width x height), 56 % padded with black"
  record = json.loads((tmp_path / "two.json").read_text())["clips"][2]
  assert record["path"] == video and record["num_frames"] == 17 and record["changes"][:2] == changes
  frames = sampling.pipeline.contexts[0][2]
  assert frames.shape == (17, 24, 16, 3)
  assert read_clip(tmp_path / "two.mp4").fps == 4


def test_what_training_has_not_shown_is_said_once(tmp_path: Path, caplog, monkeypatch):
  usage = Usage(sizes=((16, 24), (24, 16)), num_frames=17, fit=ClipFit.PAD, fps=8.0)
  monkeypatch.setattr(EchoPipeline, "usage", usage)
  monkeypatch.setattr("univid_jax.cli.context_reader.padded_size", lambda size, pipeline: size)
  image = str(write_image(tmp_path / "a.png", size=(40, 24)))

  def said(sampling: RequestRunner, *names: str) -> list[str]:
    caplog.clear()
    for name in names:
      sampling.run(Request((image,) * 3, tmp_path / name, needs_suffix=True))
    return [message for message in caplog.messages if "not trained on this" in message]

  assert said(runner(), "as_trained") == []
  assert len(said(runner(keep_size=True), "input_size")) == 1
  form = choose_format(TRAINED, **AS_TRAINED | {"size": (40, 24), "num_frames": 5, "fit": "crop"})
  assert said(runner(form, num_frames=5), "one", "two") == [
    "the model was not trained on this, expect worse results: 24 x 40 pixels (width x height) "
    "instead of 24 x 16 or 16 x 24, 2.5 times as many, "
    "which take at least 2.5 times as long; 5 frames instead of 1 or 17"
  ]


@pytest.mark.parametrize("num_frames, expected", [(33, 33), (None, 17), (1, 17), (5, 5)])
def test_as_many_frames_are_read_as_are_asked_for(tmp_path: Path, num_frames, expected):
  video = str(write_video(tmp_path / "v.mp4", 50))
  form = choose_format(TRAINED, **AS_TRAINED | {"num_frames": num_frames})
  sampling = runner(form, num_frames=num_frames)
  sampling.run(Request((video,) * 3, tmp_path / "out.npy"))
  lengths = [expected, expected, 50 if num_frames is None else expected]
  assert [len(clip) for clip in sampling.pipeline.contexts[0]] == lengths
  assert len(np.load(tmp_path / "out.npy")) == (num_frames or 50)


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "frames/"])
def test_lossless_results_and_sound(tmp_path: Path, name):
  video = str(write_video(tmp_path / "v.mp4", 17))
  (request,) = plan_requests([video] * 3, [], str(tmp_path) + "/" + name)
  sampling = runner(copy_audio=True, grid=True)
  sampling.run(request)
  found = read_clip(tmp_path / name).frames
  assert found.shape == (17, 16, 24, 3)
  if name != "out.mp4":
    assert np.array_equal(found, sampling.pipeline.contexts[0][2])


def test_an_interrupted_result_does_not_count_as_finished(tmp_path: Path, monkeypatch):
  """Nor does it damage the earlier one at its place, which is without a record from then on."""
  video = str(write_video(tmp_path / "v.mp4", 17))
  (request,) = plan_requests([video] * 3, [], str(tmp_path / "out.mp4"))
  sampling = runner()
  prepared = sampling.prepare(request)
  sampling.run(request)
  assert sampling.has_finished(request.out, prepared.record)
  first = request.out.read_bytes()

  def stop_halfway(path: Path, *arguments: object, **options: object) -> None:
    path.write_bytes(first[:100])
    raise KeyboardInterrupt

  monkeypatch.setattr(writer, "_write_video", stop_halfway)
  with pytest.raises(KeyboardInterrupt):
    runner(num_frames=5).run(request)
  assert request.out.read_bytes() == first
  assert not sampling.has_finished(request.out, prepared.record)


def test_only_a_complete_result_of_the_same_request_counts_as_finished(tmp_path: Path):
  video = str(write_video(tmp_path / "v.mp4", 17))
  (request,) = plan_requests([video] * 3, [], str(tmp_path / "out.mp4"))
  both, alone = runner(grid=True), runner()

  def has_finished(sampling: RequestRunner) -> bool:
    prepared = sampling.prepare(request)
    return sampling.has_finished(prepared.path, prepared.record)

  both.run(request)
  assert has_finished(both) and not has_finished(alone) and not has_finished(runner(grid=True, copy_audio=True))
  other = runner(num_frames=5)
  other.run(request)  # the whole sentence next to it is that of before
  assert has_finished(other) and not has_finished(runner(grid=True, num_frames=5))
  request.out.write_bytes(b"")
  assert not has_finished(other)


def test_nothing_but_an_earlier_result_is_replaced(tmp_path: Path):
  image = str(write_image(tmp_path / "a.png"))
  for name in ("config.json", "bytes.json", "list.json"):
    (tmp_path / name).write_bytes({"config.json": b'{"version": 1}', "bytes.json": b"\xe9"}.get(name, b"[]"))
    with pytest.raises(UserError, match=f"its record would replace {name}, which is another file"):
      check_outputs([Request((image,) * 3, tmp_path / f"{name.removesuffix('.json')}.png")])
  whole = str(write_image(tmp_path / "out_grid.png"))
  with pytest.raises(UserError, match=r"out_grid\.png: it is one of the clips"):
    runner(grid=True, num_frames=1).run(Request((image, image, whole), tmp_path / "out.png"))
  with pytest.raises(UserError, match="it is one of the clips"):
    check_outputs([Request((image,) * 3, Path(whole))], first_frame=whole)
  queries = [str(write_image(tmp_path / name)) for name in ("x.png", "x_grid.png")]
  requests = plan_requests([image] * 2, queries, str(tmp_path / "results"))
  check_outputs(requests)
  with pytest.raises(UserError, match="the sentence of query 'x' would replace another query's result"):
    check_outputs(requests, grid=True)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf8(tmp_path: Path):
  image = write_image(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
  request = Request((str(image),) * 3, tmp_path / "out.png")
  runner().run(request)
  record = json.loads((tmp_path / "out.json").read_bytes())
  assert record["clips"][0]["path"] == str(image)


def test_queries_with_dots_and_foreign_files(tmp_path: Path):
  folder = tmp_path / "queries"
  folder.mkdir()
  write_image(folder / "a.v2.png")
  for name in ("._a.v2.png", "Thumbs.db", ".hidden.mp4"):
    (folder / name).write_bytes(b"x")
  (request,) = plan_requests(["a.png", "b.png"], [str(folder)], str(tmp_path / "out"))
  assert request == Request(("a.png", "b.png", str(folder / "a.v2.png")), tmp_path / "out" / "a.v2", needs_suffix=True)
  runner().run(dataclasses.replace(request, clips=(str(folder / "a.v2.png"),) * 3))
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.v2.json", "a.v2.png"]


def test_folders_among_queries_are_counted(tmp_path: Path, caplog):
  folder = tmp_path / "queries"
  for name in ("b", "c", ".hidden"):
    (folder / name).mkdir(parents=True)
  with pytest.raises(UserError, match=rf"no clips in --queries={folder}, but folders, such as {folder}/b: name one of"):
    plan_requests(["a.png"] * 2, [str(folder)], "out")
  write_image(folder / "x.png")
  assert len(plan_requests(["a.png"] * 2, [str(folder)], "out")) == 1
  (line,) = caplog.messages
  assert line.startswith(f"--queries={folder}: 2 folders in it are left out; ")
  plan_requests(["a.png"] * 2, [str(folder / "b"), str(folder / "c")], "out")
  assert len(caplog.messages) == 1


def test_queries_of_one_name_are_both_named(tmp_path: Path):
  for name in ("v.gif", "v.mp4"):
    write_video(tmp_path / name, 5)
  with pytest.raises(UserError, match=rf"the results of {tmp_path}/v.gif and {tmp_path}/v.mp4 would both be named 'v'"):
    plan_requests(["a.png"] * 2, [str(tmp_path)], "out")


def test_a_result_that_loses_its_record_is_named(tmp_path: Path, caplog):
  """One of the same name in another format."""
  video = str(write_video(tmp_path / "b.mp4", 17))
  for name in ("v.gif", "v.gif", "v.mp4"):
    assert not caplog.messages or "was the record" not in caplog.text
    runner().run(Request((video,) * 3, tmp_path / name))
  assert f"{tmp_path / 'v.json'} was the record of v.gif, and becomes that of v.mp4" in caplog.messages


def test_targets_are_checked_first(tmp_path: Path, monkeypatch):
  image = str(write_image(tmp_path / "a.png"))
  (tmp_path / "folder.png").mkdir()
  link = tmp_path / "link.png"
  link.symlink_to(image)
  for out, message in (
    ("x.docx", "use .png"),
    ("a.png/x.png", "cannot write to the folder"),
    ("folder.png", "it is a folder"),
    ("a.png", "it is one of the clips"),
    ("link.png", "it is one of the clips"),
    ("x" * 300 + ".mp4", "File name too long"),
  ):
    with pytest.raises((UserError, OSError), match=message):
      check_outputs([Request((image,), tmp_path / out)])
  sampling = runner(num_frames=5)
  with pytest.raises(UserError, match="cannot write 5 frames to the image"):
    sampling.run(Request((image,) * 3, tmp_path / "x.png"))
  monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
  with pytest.raises(OSError, match=r"the folder .* needs .*[1-9].* kB, and its disk has 1.00 kB left"):
    sampling.run(Request((image,) * 3, tmp_path / "x.mp4"))
  with pytest.raises(UserError, match="it is one of the clips"):
    runner().run(Request((image,) * 3, tmp_path / "a", needs_suffix=True))
  assert not sampling.pipeline.contexts
  assert {path.name for path in tmp_path.iterdir()} == {"a.png", "link.png", "folder.png"}


@pytest.mark.parametrize(
  "lengths, is_refused",
  [((1, 1, 9), True), ((9, 9, 9), True), ((1, 9, 9), True), ((9, 9, 1), False), ((9, 1, 9), False), ((1, 1, 3), False)],
)
def test_an_image_cannot_be_the_result_of_a_video(tmp_path: Path, lengths, is_refused):
  """Known before the model is loaded, unless the model decides about the length."""
  for name, length in zip("abc", lengths):
    np.save(tmp_path / f"{name}.npy", np.zeros((length, 16, 16, 3), np.uint8))
  request = Request(tuple(str(tmp_path / f"{name}.npy") for name in "abc"), tmp_path / "odd.png")
  if is_refused:
    with pytest.raises(UserError, match=r"cannot write a video to the image .*odd\.png: use \.mp4"):
      check_outputs([request])
  else:
    check_outputs([request])
  check_outputs([request], num_frames=1)
  check_outputs([dataclasses.replace(request, out=tmp_path / "even.mp4")])


@pytest.mark.parametrize(
  "out, needs_suffix", [("x" * 250 + ".mp4", False), ("x" * 250 + ".png", False), ("x" * 250, True)]
)
def test_names_of_files_beside_the_result_are_checked_first(tmp_path: Path, out, needs_suffix):
  """The record's, and with --grid that of the whole sentence."""
  request = Request(("a.png",), tmp_path / out, needs_suffix=needs_suffix)
  with pytest.raises(OSError, match="File name too long"):
    check_outputs([request], grid=True)
  check_outputs([request])
  with pytest.raises(OSError, match="File name too long"):
    check_outputs([dataclasses.replace(request, out=request.out.with_name(f"x{out}"))])


def test_results_of_queries_are_in_a_folder(tmp_path: Path):
  with pytest.raises(UsageError, match=r"--out is a folder of results, and 'out.PNG' is the name of one result"):
    plan_requests(["a.png"] * 2, ["b.png"], "out.PNG")
  (tmp_path / "out.png").mkdir()
  for name in ("out.png", "results.v2"):
    (request,) = plan_requests(["a.png"] * 2, ["b.png"], str(tmp_path / name))
    assert request.out == tmp_path / name / "b"
