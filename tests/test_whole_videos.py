"""Whole videos from files: length, rate, size and sound are those of the query; a killed command is resumed."""

import dataclasses
import io
import json
import pkgutil
import re
import signal
from pathlib import Path
from unittest import mock

import av
import jax
import numpy as np
import pytest
from tqdm import tqdm

from tests.commands import finish, start_python
from tests.helpers import give_prompts, random_pipeline
from tests.test_long_video import moving_video
from tests.test_writer import write_video_with_sound
from univid_jax.cli import whole_videos
from univid_jax.cli.flags import UsageError
from univid_jax.cli.requests import RequestRunner
from univid_jax.cli.sampling import Request, SamplingArguments, plan_requests
from univid_jax.cli.whole_videos import _RemainingTime
from univid_jax.config.boundary import override
from univid_jax.core.options import ClipFit
from univid_jax.data.media.reader import probe, read_clip
from univid_jax.data.media.writer import write_clip
from univid_jax.data.pictures import CLIP_GAP
from univid_jax.inference.plan import SamplingOptions
from univid_jax.inference.windows import Windows
from univid_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def pipeline(tiny_config):
  return random_pipeline(
    override(tiny_config, {"data.num_frames": 9, "data.fps": 8.0}), make_mesh({}, jax.devices()[:1])
  )


def runner(pipeline, **options) -> RequestRunner:
  arguments = SamplingArguments(steps=SamplingOptions(num_inference_steps=2))
  return RequestRunner(pipeline, pipeline.clip_format, arguments, {"checkpoint": "x"}, **options)


@pytest.fixture
def clips(tmp_path: Path) -> tuple[str, str, str]:
  """An example pair of another size and rate, and a query of 50 frames with sound."""
  for name in ("a", "a2"):
    write_clip(tmp_path / f"{name}.mp4", moving_video(20, (32, 24)), fps=16)
  write_video_with_sound(tmp_path / "b.mov", "aac", seconds=2.0)  # 64x48 pixels, 25 frames per second
  return str(tmp_path / "a.mp4"), str(tmp_path / "a2.mp4"), str(tmp_path / "b.mov")


@pytest.mark.parametrize("carry_context", [pytest.param(False, marks=pytest.mark.long), True])
def test_the_result_is_like_the_query(pipeline, clips, tmp_path, caplog, monkeypatch, carry_context):
  write_clip(tmp_path / "odd.mp4", moving_video(50, (18, 22)), fps=25)
  sample = mock.Mock(wraps=pipeline.sample_video)
  monkeypatch.setattr(pipeline, "sample_video", sample)
  sampling = runner(pipeline, keep_size=True, copy_audio=True, carry_context=carry_context, grid=True)
  with caplog.at_level("INFO", "univid_jax"):
    line = sampling.run(Request((*clips[:2], str(tmp_path / "odd.mp4")), tmp_path / "out", needs_suffix=True))
  paths = f"{tmp_path / 'out.mp4'} and {tmp_path / 'out_grid.mp4'}"
  assert line == f"wrote 50 frames of 22 x 18 pixels (width x height): {paths}"
  assert sample.call_args.kwargs["carry_context"] == carry_context
  out = read_clip(tmp_path / "out.mp4")
  assert out.frames.shape == (50, 18, 22, 3) and out.fps == pytest.approx(25)
  assert read_clip(tmp_path / "out_grid.mp4").frames.shape[0] == 50
  assert f"{tmp_path / 'odd.mp4'}: 22 x 18 extended to 24 x 20" in caplog.messages or "extended" in caplog.text
  assert any("50 frames in" in message for message in caplog.messages)
  (warning,) = [message for message in caplog.messages if "not trained on this" in message]
  assert (
    "24 x 24 pixels (width x height) instead of 16 x 16, 2.2 times as many, "
    "which take at least 2.2 times as long; 25 frames per second instead of 8" in warning
  )
  assert any("a given first frame, which only TI2V" in message for message in caplog.messages) == carry_context
  record = json.loads((tmp_path / "out.json").read_text())
  assert (record["num_frames"], record["height"], record["width"], record["fps"]) == (50, 18, 22, 25)
  assert record["carry_context"] == carry_context and record["clips"][2]["num_frames"] == 50
  assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shape, is_said", [((16, 16), False), ((16, 32), True)])
def test_another_fit_of_the_first_frame_is_said(pipeline, tmp_path, caplog, shape, is_said):
  names = [str(tmp_path / f"{name}.png") for name in ("a", "a2", "b")]
  for name in names:
    write_clip(name, moving_video(1, (16, 16)))
  write_clip(tmp_path / "first.png", moving_video(1, shape))
  sampling = runner(pipeline, first_frame=str(tmp_path / "first.png"))
  changes = {
    "form": dataclasses.replace(sampling.form, fit=ClipFit.PAD),
    "arguments": dataclasses.replace(sampling.arguments, num_frames=5),
  }
  dataclasses.replace(sampling, **changes).run(Request(tuple(names), tmp_path / "out.npy"))
  assert ("padded with black instead of cropped" in caplog.text) == is_said


def test_a_profile_without_context_begins_with_the_first_frame(pipeline, tmp_path):
  write_clip(tmp_path / "first.png", moving_video(1, (16, 16)))
  sampling = runner(pipeline, first_frame=str(tmp_path / "first.png"))
  assert sampling.profile(Request((), tmp_path / "out.mp4"), 1).startswith("wrote a profile of 1 steps")


def test_the_bar_has_a_total_from_the_beginning(pipeline, clips, tmp_path, capfd):
  runner(pipeline).run(Request(clips, tmp_path / "out.npy"))
  err = capfd.readouterr().err
  assert " 0step" not in err and re.search(r"sample: +0%.* 0/\d+ \[", err)


def test_sound_and_rate(pipeline, clips, tmp_path):
  runner(pipeline, copy_audio=True).run(Request(clips, tmp_path / "out.mp4"))
  assert read_clip(tmp_path / "out.mp4").frames.shape == (50, 16, 16, 3)
  with av.open(str(tmp_path / "out.mp4")) as container:
    samples = sum(frame.samples for frame in container.decode(container.streams.audio[0]))
    assert samples / container.streams.audio[0].rate == pytest.approx(2.0, abs=0.15)
  runner(pipeline, video_fps=5.0).run(Request(clips, tmp_path / "slow.mp4"))
  slow = read_clip(tmp_path / "slow.mp4")
  assert slow.fps == pytest.approx(5) and len(slow.frames) == 10
  rate, count = probe(clips[-1]).fps, probe(clips[-1]).num_frames
  runner(pipeline, video_fps=rate * 1.001).run(Request(clips, tmp_path / "kept.mp4"))
  kept = read_clip(tmp_path / "kept.mp4")
  assert len(kept.frames) == count and kept.fps == pytest.approx(rate, rel=1e-4), "as long as the sound"


@pytest.mark.parametrize(
  "carry_context, name",
  [
    (False, "out.mp4"),
    pytest.param(True, "frames", marks=pytest.mark.long),
    pytest.param(False, "frames", marks=pytest.mark.long),
    pytest.param(True, "out.mp4", marks=pytest.mark.long),
  ],
)
def test_killed_and_resumed(pipeline, clips, tmp_path, monkeypatch, carry_context, name):
  """The result has the same bytes, whether it was killed while sampling or while writing."""
  monkeypatch.setattr("univid_jax.inference.progress_file.SAVE_SECONDS", 0.0)
  sampling = runner(pipeline, carry_context=carry_context, keep_size=True)
  sampling.run(Request(clips, tmp_path / "whole" / name))
  request = Request(clips, tmp_path / "parts" / name)
  for place, calls in (("_RemainingTime.__call__", 9), ("_RemainingTime.__call__", 3)):
    with monkeypatch.context() as patch:
      _fail_after(patch, f"univid_jax.cli.whole_videos.{place}", calls)
      with pytest.raises(KeyboardInterrupt):
        sampling.run(request)
    assert not (tmp_path / "parts" / name).exists()
  sampling.run(request)
  whole, parts = tmp_path / "whole" / name, tmp_path / "parts" / name
  for path in sorted(whole.iterdir()) if whole.is_dir() else [whole]:
    assert (parts / path.name if whole.is_dir() else parts).read_bytes() == path.read_bytes()
  assert {path.name for path in parts.parent.iterdir()} == {name, f"{Path(name).stem}.json"}


# `univid-sample`, which saves after every step, and dies at a place after a number of calls: PLACE:CALLS.
DYING_SAMPLE = """
import os, signal, sys
from univid_jax import sample
from univid_jax.cli import whole_videos
from univid_jax.inference.progress_file import ProgressFile

ProgressFile.is_due = lambda self: True
place, left = sys.argv[1].split(":")[0], iter(range(int(sys.argv[1].split(":")[1])))

def dying(function):
  def run(*arguments):
    if next(left, None) is None:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
  return run

if place == "save":
  ProgressFile.save = dying(ProgressFile.save)
elif place == "write":
  crop = whole_videos._crop
  whole_videos._crop = lambda blocks, *size: map(dying(lambda block: block), crop(blocks, *size))
sys.exit(sample.main(["sample", *sys.argv[2:]]))
"""


@pytest.mark.long
@pytest.mark.parametrize("mode, name", [("", "out.mp4"), ("--carry_context", "frames")], ids=["joint", "sequential"])
def test_a_process_that_was_killed_leaves_the_rest_to_the_next(clips, tmp_path, mode, name):
  """By SIGKILL, while sampling and writing: in the end the bytes are those of a command that runs through."""
  flags = ("--checkpoint=small", f"--clips={','.join(clips)}", "--steps=6", "--size=input", *filter(None, [mode]))

  def run(place: str, folder: str) -> int:
    out = f"--out={tmp_path / folder / name}{'/' if name == 'frames' else ''}"
    return finish(start_python("-c", DYING_SAMPLE, place, *flags, out)).returncode

  assert run("nowhere:0", "whole") == 0
  for place in ("save:1", "save:2", "write:3"):
    assert run(place, "parts") == -signal.SIGKILL
    assert not (tmp_path / "parts" / name).exists() and (tmp_path / "parts" / f"{name}.state.npz").exists()
  assert run("nowhere:0", "parts") == 0
  paths = sorted((tmp_path / "whole").rglob("*.png" if name == "frames" else name))
  assert len(paths) == (50 if name == "frames" else 1)
  for path in paths:
    assert (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
  assert {path.name for path in (tmp_path / "parts").iterdir()} == {name, f"{Path(name).stem}.json"}


@pytest.mark.parametrize(
  "place", ["univid_jax.cli.whole_videos.concatenate_clips", "univid_jax.cli.requests.write_record"]
)
def test_what_fails_after_sampling_costs_no_steps(pipeline, clips, tmp_path, monkeypatch, place):
  taken: list[int] = []
  sampling = runner(pipeline, grid=True, progress=lambda count, total: taken.append(count))
  request = Request(clips, tmp_path / "out.npy")
  with monkeypatch.context() as patch:
    patch.setattr(place, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      sampling.run(request)
  assert taken and (tmp_path / "out.npy.state.npz").exists()
  taken.clear()
  sampling.run(request)
  assert not taken and {path.name for path in tmp_path.glob("out*")} == {"out.npy", "out_grid.mp4", "out.json"}


def test_the_grid_of_a_video_that_stands_still(pipeline, clips, tmp_path, monkeypatch):
  """It shows the frames as sampled: a GIF has one for several equal ones."""
  fades = np.repeat(np.arange(25, dtype=np.uint8) * 8, 2)[:, None, None, None] + np.zeros((50, 16, 16, 3), np.uint8)
  monkeypatch.setattr("univid_jax.inference.long_video.VideoSample.__iter__", lambda self: iter([fades]))
  runner(pipeline, grid=True).run(Request(clips, tmp_path / "out.gif"))
  assert len(read_clip(tmp_path / "out.gif").frames) == 25
  grid = read_clip(tmp_path / "out_grid.gif", 0, 50, fps=25.0).frames
  assert np.abs(grid[:, 8, -8].astype(int) - fades[:, 8, 8]).max() <= 8


def test_the_grid_shows_the_same_time_of_all_clips(monkeypatch):
  """In several blocks; what has ended repeats its last frame."""

  def greys(first, count):
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] + np.zeros((count, 4, 6, 3), np.uint8)

  blocks = []
  monkeypatch.setattr(whole_videos, "GRID_BLOCK", 2)
  monkeypatch.setattr(whole_videos, "write_frames", lambda path, parts, **_: blocks.extend(parts))
  query = mock.Mock(size=(4, 6), fps=None, read=lambda start, count: greys(100 + start, count))
  query.footage.num_frames = 7
  examples = [mock.Mock(frames=greys(10, 5)), mock.Mock(frames=greys(50, 1))]
  video = whole_videos.WholeVideo(mock.Mock(), examples, query, SamplingArguments(), {}, carry_context=False)
  video._write_grid(Path("grid.mp4"), io.BytesIO(greys(200, 7).tobytes()))
  shown = np.concatenate(blocks)[:, 0, :: 6 + CLIP_GAP, 0]
  expected = [10, 11, 12, 13, 14, 14, 14], [50] * 7, range(100, 107), range(200, 207)
  np.testing.assert_array_equal(shown.T, [list(each) for each in expected])


def _fail_after(patch: pytest.MonkeyPatch, place: str, calls: int) -> None:
  """Interrupts a function of the module, or a method, after a number of calls."""
  left, function = iter(range(calls)), pkgutil.resolve_name(place.replace("whole_videos.", "whole_videos:"))

  def fail(*args, **options):
    if next(left, None) is None:
      raise KeyboardInterrupt
    return function(*args, **options)

  patch.setattr(place, fail)


def test_first_frames(pipeline, tmp_path):
  """The result begins with the image; without a context it has the length of training."""
  write_clip(tmp_path / "first.png", moving_video(1, (16, 16)))
  write_clip(tmp_path / "b.npy", moving_video(5))
  sampling = runner(pipeline, first_frame=str(tmp_path / "first.png"))
  assert len(plan_requests([], [], str(tmp_path / "alone.npy"), first_frame="x")) == 1
  for name, clips, count in (("alone", (), 9), ("context", (str(tmp_path / "b.npy"),) * 3, 5)):
    sampling.run(Request(clips, tmp_path / f"{name}.npy"))
    out = np.load(tmp_path / f"{name}.npy")
    shown = pipeline.decode(pipeline.encode(moving_video(1, (16, 16))))
    assert len(out) == count and np.abs(out[0] - (shown[0] + 1) * 127.5).max() <= 1
    assert json.loads((tmp_path / f"{name}.json").read_text())["first_frame"]["path"].endswith("first.png")
  for arguments, message in ((([], [], "x.png"), "--clips is missing"), (([], ["b"], "x"), "excludes --queries")):
    with pytest.raises(UsageError, match=message):
      plan_requests(*arguments, first_frame="x" if "b" in arguments[1] else None)


@pytest.mark.parametrize("size", [(20, 22), (40, 44)])
def test_a_first_frame_at_the_size_of_the_query(pipeline, tmp_path, size):
  """It is brought to the pixels of B and extended like B, so that it is what the result begins with."""
  query = moving_video(9, (20, 22))
  write_clip(tmp_path / "b.npy", query)
  write_clip(tmp_path / "first.png", query[:1].repeat(size[0] // 20, axis=1).repeat(size[1] // 22, axis=2))
  sampling = runner(pipeline, keep_size=True, first_frame=str(tmp_path / "first.png"))
  prepared = sampling.prepare(Request((str(tmp_path / "b.npy"),) * 3, tmp_path / "out.npy"))
  (first,) = prepared.first.frames
  difference = np.abs(first.astype(int) - prepared.clips[-1].frames[0])
  assert first.shape == (24, 24, 3) and difference.mean() <= (0 if size == (20, 22) else 12)
  sampling.run(prepared.request)
  shown = (pipeline.decode(pipeline.encode(first[None]))[0, :20, :22] + 1) * 127.5
  assert np.abs(np.load(tmp_path / "out.npy")[0] - shown).max() <= 1


@pytest.mark.parametrize("guidance_range", [pytest.param(None, marks=pytest.mark.long), (0.0, 0.8)])
def test_warm_up_compiles_everything(tiny_config, clips, tmp_path, guidance_range):
  """Sampling afterwards compiles nothing, and nothing was written."""
  config = override(tiny_config, {"data.num_frames": 9})
  pipeline = give_prompts(random_pipeline(config, make_mesh({}, jax.devices()[:1])))
  write_clip(tmp_path / "short.npy", moving_video(9))
  sampling = runner(pipeline)
  steps = SamplingOptions(num_inference_steps=20, guidance_scale=2.0, guidance_range=guidance_range)
  sampling = dataclasses.replace(sampling, arguments=SamplingArguments(steps=steps, negative_prompt="no"))
  requests = [Request(clips, tmp_path / "long.npy"), Request((str(tmp_path / "short.npy"),) * 3, tmp_path / "x.npy")]
  assert sampling.shorten().num_steps <= 5
  before = set(tmp_path.iterdir())
  assert "programs of 2 results" in sampling.warm_up(requests) and set(tmp_path.iterdir()) == before
  (step,) = pipeline.sampler._steps.values()
  programs = [pipeline.sampler.prepare, step, pipeline.joint_sampler._velocity]
  counts = [program._cache_size() for program in programs]
  for request in requests:
    sampling.run(request)
  assert [program._cache_size() for program in programs] == counts
  assert len(np.load(tmp_path / "long.npy")) == 50


def test_memory_of_a_step_is_that_of_a_window(pipeline, clips, tmp_path):
  """The programs of a long video are those of a short one: nothing on the devices has the video's length."""
  video = moving_video(40, seed=1)
  examples = [moving_video(9)] * 2
  list(pipeline.sample_video(examples, video, num_inference_steps=2))
  count = pipeline.joint_sampler._velocity._cache_size()
  list(pipeline.sample_video(examples, moving_video(90, seed=1), num_inference_steps=2))
  assert pipeline.joint_sampler._velocity._cache_size() == count


def test_seams(tiny_config):
  """Frames differ across the borders of windows as across borders of groups within windows, in the mean to 10 %."""
  config = override(tiny_config, {"data.num_frames": 17})
  pipeline = random_pipeline(config, make_mesh({}, jax.devices()[:1]))
  examples, num_frames = [moving_video(17, seed=9)] * 2, 97
  borders, inside = [], []
  for seed in range(3):
    video = pipeline.sample_video(examples, moving_video(num_frames, seed=seed), num_inference_steps=4)
    frames = np.concatenate(list(video)).astype(float)
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    starts = set(Windows.spread(num_frames, length=5, temporal_stride=4, overlap=2).starts)
    for group in range(1, num_frames // 4):
      (borders if group in starts else inside).append(changes[4 * group])
  assert len(borders) > 20 and len(inside) > 20
  assert np.mean(borders) == pytest.approx(np.mean(inside), rel=0.1)


class TestRemainingTime:
  @staticmethod
  def run(monkeypatch, caplog, reports, total):
    """Reports steps at given seconds; returns what was said."""
    clock = [0.0]
    monkeypatch.setattr("univid_jax.cli.whole_videos.time", mock.Mock(monotonic=lambda: clock[0]))
    remaining = _RemainingTime(tqdm(total=total, file=io.StringIO()), None)
    with caplog.at_level("INFO", "univid_jax"):
      for taken, clock[0] in reports:
        remaining(taken)
    return caplog.messages

  def test_compiling_does_not_count(self, monkeypatch, caplog):
    reports = [(taken, 60.0 + 10 * (taken - 1)) for taken in range(1, 100)]
    assert self.run(monkeypatch, caplog, reports, 100) == ["about 16 minutes remain"], "98 steps of 10 s"

  def test_steps_of_an_earlier_process_take_no_time(self, monkeypatch, caplog):
    """200 of 800 steps are reported at once; then programs are compiled, which takes a minute."""
    reports = [(200, 0.0), *((200 + taken, 60.0 + 0.02 * taken) for taken in range(1, 601))]
    assert self.run(monkeypatch, caplog, reports, 800) == ["about 11 seconds remain"], "539 steps of 0.02 s"
