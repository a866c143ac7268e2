"""What the demo page does, without its looks: it runs `sample`, and shows the command that it has run."""

import contextlib
import dataclasses
import queue
import shlex
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from univid_jax import Pipeline
from univid_jax.checkpoints.built_in import BUILT_IN
from univid_jax.checkpoints.experts import join_weight
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run import has_checkpoint, read_run
from univid_jax.cli.flags import CommandFlags
from univid_jax.cli.page_examples import NAMES, Example
from univid_jax.cli.page_pictures import LARGE, MAX_FRAMES, SMALL, draw_views, show, show_key_frames
from univid_jax.cli.sample_command import SampleCommand
from univid_jax.core.errors import UserError
from univid_jax.core.text import size_text
from univid_jax.data.clips import ClipFormat, read_context
from univid_jax.data.media.reader import probe, read_clip
from univid_jax.inference.preview import Draw

# Least time between two pictures of an estimate.
PREVIEW_SECONDS = 0.25

RESULT = "B2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
  """What can be chosen.

  Attributes:
    checkpoints: the first is loaded first.
    loras: each with the weight that it has at first.
    distillation: values of --accelerate; none if there is no distillation.
    flags: of `sample` in addition, for every model.
  """

  checkpoints: Sequence[str]
  loras: Sequence[tuple[str, float]] = ()
  distillation: Sequence[str] = ()
  flags: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """What was chosen.

  Attributes:
    checkpoint: one of those offered.
    lora_weights: of the LoRAs offered; 0 leaves one out.
    accelerated: whether to use the distillation.
    steps: None leaves them to the model.
    task, prompt: of the sentence; the prompt is used if both are given.
    num_frames: of B'; None infers them.
    seed: of the noise.
  """

  checkpoint: str
  lora_weights: Sequence[float] = ()
  accelerated: bool = False
  steps: int | None = None
  task: str = ""
  prompt: str = ""
  num_frames: int | None = None
  seed: int = 0

  def model_flags(self, offer: Offer) -> list[str]:
    """Returns the flags of the model.

    Raises:
      UserError: the checkpoint is not offered.
    """
    if self.checkpoint not in offer.checkpoints:
      raise UserError(f"choose one of the checkpoints {', '.join(offer.checkpoints)}, not {self.checkpoint!r}")
    chosen = [(path, weight) for (path, _), weight in zip(offer.loras, self.lora_weights, strict=True) if weight]
    loras = ",".join(join_weight(path, weight) for path, weight in chosen)
    added = [f"--lora={loras}"] if loras else []
    added += [f"--accelerate={','.join(offer.distillation)}"] if self.accelerated and offer.distillation else []
    flags = [flag for flag in offer.flags if added or not flag.startswith("--lora_skip_unmatched")]
    return [f"--checkpoint={self.checkpoint}", *flags, *added]

  def sample_flags(self) -> list[str]:
    """Returns the flags that say how to sample."""
    values = {
      "prompt": self.prompt,
      "task": "" if self.prompt else self.task,
      "steps": "" if self.accelerated or self.steps is None else self.steps,
      "num_frames": self.num_frames or "",
    }
    return [f"--{name}={value}" for name, value in values.items() if value != ""] + [f"--seed={self.seed}"]


@dataclasses.dataclass(frozen=True)
class Status:
  """What happens at the moment, and a picture of the current estimate if there is a new one."""

  text: str
  picture: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedSample:
  """A finished sample.

  Attributes:
    text: what it is.
    large, pairs, difference: files to show: B'; A and A' above B and B'; the difference of B' and B.
    bundle: a .zip of the clips, the result, its record and the command.
    command: what samples it again, in the folder of the clips.
  """

  text: str
  large: Path
  pairs: Path
  difference: Path
  bundle: Path
  command: str


class Stopped(Exception):
  """The page has gone, or asked to stop."""


class Session:
  """Samples what is chosen, with one model in memory."""

  def __init__(self, offer: Offer):
    self.offer = offer
    self._flags: Sequence[str] = ()
    self._loaded: tuple[Pipeline, Origin] | None = None
    self._form = ClipFormat(size=(0, 0), num_frames=1)  # of the model, also while another one is loaded
    self._lock = threading.Lock()

  @property
  def pipeline(self) -> Pipeline:
    """The model that was loaded last."""
    assert self._loaded, "a model is opened first"
    return self._loaded[0]

  def first_choice(self) -> Choice:
    """Returns what is chosen unless something else is."""
    weights = tuple(weight for _, weight in self.offer.loras)
    accelerated = bool(self.offer.distillation)
    return Choice(checkpoint=self.offer.checkpoints[0], lora_weights=weights, accelerated=accelerated)

  def open(self, choice: Choice) -> None:
    """Loads a model unless it is loaded.

    Raises:
      UserError, OSError: it cannot be loaded.
    """
    self._load(_parse([*choice.model_flags(self.offer), f"--out={RESULT}"]), choice)

  def _load(self, command: SampleCommand, choice: Choice) -> tuple[Pipeline, Origin]:
    flags = choice.model_flags(self.offer)
    if self._loaded is None or self._flags != flags:
      self._loaded = None  # makes room
      self._loaded, self._flags = command.load(), flags
      self._form = self.pipeline.clip_format
    return self._loaded

  def show(self, path: str, folder: Path) -> Path:
    """Writes a clip as the model sees it, enlarged."""
    (clip,) = read_context([path], self._form)
    return show(folder / "clip", clip.frames, fps=clip.fps, side=SMALL)

  def write_example(self, example: Example, folder: Path) -> list[Path]:
    """Writes the clips of an example, at the size of the model."""
    return example.write(folder, size=self._form.size, num_frames=self._form.num_frames)

  def sample(self, choice: Choice, clips: Sequence[str], folder: Path) -> Iterator[Status | FinishedSample]:
    """Samples in a thread of its own, and yields what happens; to close the generator stops it.

    Args:
      choice: what was chosen.
      clips: files of A, A' and B.
      folder: a new one, for all files.

    Raises:
      UserError, OSError: something is wrong with the clips or the choice.
    """
    events: queue.Queue[Status | FinishedSample | BaseException] = queue.Queue()
    stopped = threading.Event()

    def emit(event: Status | FinishedSample) -> None:
      if stopped.is_set():
        raise Stopped
      events.put(event)

    def work() -> None:
      try:
        with self._lock:
          emit(self._run(choice, clips, folder, emit))
      except BaseException as error:
        events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
      while True:
        event = events.get()
        if isinstance(event, BaseException):
          raise event
        yield event
        if isinstance(event, FinishedSample):
          return
    finally:
      stopped.set()
      thread.join()

  def _run(self, choice: Choice, clips: Sequence[str], folder: Path, emit: Callable[[Status], None]) -> FinishedSample:
    names = [f"{name}{Path(clip).suffix.lower()}" for name, clip in zip(NAMES, clips, strict=True)]
    for name, clip in zip(names, clips):
      shutil.copyfile(clip, folder / name)
    flags = [*choice.model_flags(self.offer), *choice.sample_flags(), "--grid"]
    command = _parse([*flags, f"--clips={','.join(str(folder / name) for name in names)}", f"--out={folder / RESULT}"])
    (request,) = command.plan_requests()
    is_loaded = self._loaded is not None and self._flags == choice.model_flags(self.offer)
    emit(Status("Reading the clips" if is_loaded else "Loading the model"))
    watch = _Watch(emit)
    runner = command.runner(*self._load(command, choice))
    runner = dataclasses.replace(runner, progress=watch.progress, preview=watch.preview)
    runner.run(request)
    line = shlex.join(["univid-sample", *flags, f"--clips={','.join(names)}", f"--out={RESULT}"])
    return _collect(folder, names, line, watch.seconds)


class _Watch:
  """Turns steps into messages."""

  def __init__(self, emit: Callable[[Status], None]):
    self._emit, self._start, self._first = emit, time.monotonic(), 0.0
    self._drawn = 0.0
    self._picture: np.ndarray | None = None

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._start

  def preview(self, taken: int, draw: Draw) -> None:
    del taken
    if time.monotonic() >= self._drawn + PREVIEW_SECONDS:
      self._picture, self._drawn = show_key_frames(draw()), time.monotonic()

  def progress(self, taken: int, total: int) -> None:
    now = time.monotonic()
    if taken == 1:
      self._first = now  # until here, programs were compiled
    left = (now - self._first) / max(taken - 1, 1) * (total - taken)
    text = f"Step {taken} of {total}" + (f", about {left:.0f} s left" if taken > 1 and left >= 1 else "")
    picture, self._picture = self._picture, None
    self._emit(Status(text, picture))


def _parse(arguments: Sequence[str]) -> SampleCommand:
  """Parses the flags of `sample`, in a namespace of their own."""
  flags = CommandFlags(None)
  command = SampleCommand(flags)
  flags.parse(["univid-sample", *arguments])
  return command


def _collect(folder: Path, names: Sequence[str], command: str, seconds: float) -> FinishedSample:
  """Draws the views of what was sampled into a folder, and packs everything that belongs to it."""
  (result,) = (path for path in folder.glob(f"{RESULT}.*") if path.suffix in (".png", ".mp4"))
  grid = result.with_name(f"{RESULT}_grid{result.suffix}")
  found = probe(result)
  count, (height, width) = found.num_frames, found.size
  is_small = count <= MAX_FRAMES and max(height, width) < LARGE
  large = show(folder / "large", read_clip(result).frames, fps=found.fps) if is_small else result
  views = draw_views(grid, folder, count)
  with zipfile.ZipFile(folder / "sample.zip", "w") as bundle:
    for path in (*names, result.name, grid.name, f"{RESULT}.json"):
      bundle.write(folder / path, path)
    bundle.writestr("sample.sh", f"#!/bin/sh\n{command}\n")
  what = "image" if count == 1 else f"video of {count} frames"
  cut = f"; comparisons show its first {MAX_FRAMES}" if count > MAX_FRAMES else ""
  text = f"B': {what} of {size_text(found.size)}, sampled in {seconds:.1f} s{cut}"
  return FinishedSample(text=text, large=large, **views, bundle=folder / "sample.zip", command=command)


def find_checkpoints() -> list[str]:
  """Returns what is offered if nothing is named: the base in the package, and workdirs in runs/, the newest first."""
  runs = [path for path in Path("runs").glob("*") if _is_run(path)]
  return [*BUILT_IN, *(str(path) for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True))]


def _is_run(path: Path) -> bool:
  with contextlib.suppress(UserError):
    return path.is_dir() and read_run(path) is not None and has_checkpoint(path)
  return False
