"""The demo page, in Gradio: its layout, and what its parts call."""

import contextlib
import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from univid_jax.cli.page_examples import EXAMPLES
from univid_jax.cli.page_prompts import offered_tasks
from univid_jax.cli.page_session import Choice, FinishedSample, Session, Status
from univid_jax.core.options import MAX_SEED

log = logging.getLogger(__name__)

TITLES = ("A", "A'", "B")
INTRODUCTION = """# Visual sentences
A and A' show a task; the model does the same to B. Images and videos of any size."""

CSS = """
.clip img, .result img, .clip video, .result video {image-rendering: pixelated}
.command .cm-content {padding-right: 72px !important}
.file .download {display: none}
.file:has(.file-preview) {height: 64px !important; min-height: 0}
.file .file-preview td {font-size: 12px; padding: 2px 4px}
.examples .grid-wrap {min-height: 0; max-height: none}
.examples .grid-container {grid-auto-rows: auto}
.examples .gallery-item, .examples .thumbnail-item {height: auto !important; min-height: 0}
.examples .thumbnail-item {aspect-ratio: 2.3}
.examples .thumbnail-item img {object-position: top}
footer {display: none !important}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important}
  .clips {flex-wrap: nowrap !important; gap: 6px !important}
  .clips > * {min-width: 0 !important}
  .examples .thumbnail-item {aspect-ratio: 1.9}
}
"""


@dataclasses.dataclass(frozen=True)
class Viewer:
  """Shows an image or a video, whichever a file is."""

  image: gr.Image
  video: gr.Video

  @classmethod
  def create(cls, image_label: str, video_label: str, *, style: str, height: int | None = None) -> "Viewer":
    options: dict[str, Any] = {"height": height, "elem_classes": style, "interactive": False}
    image = gr.Image(label=image_label, visible=True, buttons=["fullscreen"], **options)
    return cls(image, gr.Video(label=video_label, visible=False, autoplay=True, loop=True, buttons=[], **options))

  @property
  def parts(self) -> list[Any]:
    return [self.image, self.video]

  @staticmethod
  def show(path: Path | None) -> list[Any]:
    """Returns the updates of its parts that show a file, or nothing."""
    is_video = path is not None and path.suffix != ".png"
    value = None if path is None else str(path)
    return [
      gr.update(value=None if is_video else value, visible=not is_video),
      gr.update(value=value if is_video else None, visible=is_video),
    ]


class Page:
  """The parts of the page.

  Args:
    session: a model is open.
    folder: for files, each in a folder of its own that is deleted once the browser has got them.
  """

  def __init__(self, session: Session, folder: Path):
    self._session, self._folder = session, folder

  def build(self) -> gr.Blocks:
    with gr.Blocks(title="univid_jax", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
      gr.Markdown(INTRODUCTION)
      with gr.Row(equal_height=False):
        with gr.Column(min_width=340):
          files, viewers = self._build_clips()
          choice = self._build_choice()
          with gr.Row():
            button = gr.Button("Sample B'", variant="primary", size="lg", scale=3)
            stop = gr.Button("Stop", size="lg", scale=1, min_width=80)
          gallery = self._build_examples()
        with gr.Column(min_width=340, elem_classes="outcome"):
          outputs = self._build_result()
      for file, viewer in zip(files, viewers):
        file.change(self._show_clip, file, viewer.parts, show_progress="hidden", api_visibility="private")
      gallery.select(self._load_example, None, files, show_progress="hidden", api_visibility="private")
      # On a phone the result is below the examples.
      scroll = (
        "(...values) => { document.querySelector('.outcome').scrollIntoView({block: 'nearest'}); return values; }"
      )
      options: dict[str, Any] = {"show_progress": "hidden", "api_name": "sample", "js": scroll}
      names = [
        *NAMES_OF_CLIPS,
        *NAMES_OF_CHOICES,
        *(f"lora_{i + 1}_weight" for i in range(len(self._session.offer.loras))),
      ]
      event = button.click(_name_parameters(self._sample, names), [*files, *choice], outputs, **options)
      stop.click(None, cancels=[event], api_visibility="private")
    return page

  def _build_clips(self) -> tuple[list[gr.File], list[Viewer]]:
    files, viewers = [], []
    with gr.Row(elem_classes="clips", equal_height=False):
      for title in TITLES:
        with gr.Column(min_width=100):
          viewers.append(Viewer.create(title, title, style="clip", height=150))
          options: dict[str, Any] = {"label": title, "show_label": False, "elem_classes": "file", "height": 110}
          files.append(gr.File(file_types=["image", "video"], type="filepath", **options))
          _shorten_errors(files[-1])
    return files, viewers

  def _build_examples(self) -> gr.Gallery:
    pictures = [(example.thumbnail(), example.title) for example in EXAMPLES]
    options: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": [], "elem_classes": "examples"}
    gr.Markdown("Examples of A, A' and B:")
    return gr.Gallery(pictures, show_label=False, columns=2, height="auto", object_fit="contain", **options)

  def _build_choice(self) -> list[Any]:
    """Builds what `_choose` reads."""
    offer, first = self._session.offer, self._session.first_choice()
    pipeline = self._session.pipeline
    many = len(offer.checkpoints) > 1
    checkpoint = gr.Dropdown([*offer.checkpoints], value=first.checkpoint, label="Checkpoint", interactive=many)
    names = [f"Weight of {Path(path).name} (0: without)" for path, _ in offer.loras]
    weights = [gr.Slider(-1, 2, value=weight, step=0.05, label=name) for name, (_, weight) in zip(names, offer.loras)]
    kind = pipeline.distillation
    steps_of = f": {kind.num_inference_steps} steps ({kind.name})" if kind else ""
    fast = gr.Checkbox(first.accelerated, label=f"Accelerate{steps_of}", visible=bool(offer.distillation))
    tasks = offered_tasks(offer.checkpoints, pipeline.usage.prompts)
    takes_prompts = tasks is not None
    with gr.Accordion("Prompt, steps and seed" if takes_prompts else "Steps and seed", open=False):
      with gr.Row(visible=takes_prompts):
        task = gr.Dropdown([("no prompt", ""), *(tasks or [])], value="", label="Task prompt")
        prompt = gr.Textbox("", label="or one of your own", max_lines=3)
      steps = gr.Slider(0, 100, value=0, step=1, label="Steps (0: the model's own)", interactive=not first.accelerated)
      with gr.Row():
        seed = gr.Number(value=0, precision=0, minimum=-MAX_SEED - 1, maximum=MAX_SEED, label="Seed", min_width=80)
        frames = gr.Number(value=0, precision=0, minimum=0, label="Frames (0: as A')", min_width=80)
    fast.change(lambda on: gr.update(interactive=not on), fast, steps, api_visibility="private")
    return [checkpoint, fast, task, prompt, steps, seed, frames, *weights]

  def _build_result(self) -> list[Any]:
    """Builds what `_sample` yields."""
    status = gr.Markdown("Choose A, A' and B, or an example.", label="Status")
    views = {}
    with gr.Tabs():
      for name, title in (("large", "B'"), ("pairs", "Side by side"), ("difference", "Difference from B")):
        with gr.Tab(title):
          # The labels name the outputs for programs, too.
          views[name] = Viewer.create(f"{title} (image)", f"{title} (video)", style="result")
    download = gr.DownloadButton("Download with clips and command", visible=False)
    options: dict[str, Any] = {"show_label": False, "interactive": False, "visible": False, "wrap_lines": True}
    command = gr.Code(label="Command", language="shell", lines=1, elem_classes="command", **options)
    return [status, *(part for view in views.values() for part in view.parts), download, command]

  def _show_clip(self, path: str | None) -> Iterator[list[Any]]:
    if path is None:
      yield Viewer.show(None)
      return
    with tempfile.TemporaryDirectory(dir=self._folder) as scratch, _shown_errors(scratch, str(Path(path).parent)):
      yield Viewer.show(self._session.show(path, Path(scratch)))

  def _load_example(self, selected: gr.SelectData) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
      yield [str(path) for path in self._session.write_example(EXAMPLES[selected.index], Path(scratch))]

  def _sample(self, a: str | None, a2: str | None, b: str | None, *values: Any) -> Iterator[list[Any]]:
    if a is None or a2 is None or b is None:
      raise _page_error("Choose files for A, A' and B, or an example.")
    with tempfile.TemporaryDirectory(dir=self._folder) as scratch, _shown_errors(scratch):
      try:
        for event in self._session.sample(_choose(*values), (a, a2, b), Path(scratch)):
          yield _show_event(event)
      except (ValueError, OSError):
        yield _show_event(Status("Nothing was sampled."))
        raise


# What `Page._sample` gets: the clips, and the values of `_choose`; weights of LoRAs follow.
NAMES_OF_CLIPS = ("a", "a2", "b")
NAMES_OF_CHOICES = ("checkpoint", "accelerate", "task", "prompt", "steps", "seed", "num_frames")


def _choose(
  checkpoint: str,
  accelerated: bool,
  task: str | None,
  prompt: str | None,
  steps: int,
  seed: int | None,
  frames: int | None,
  *weights: float,
) -> Choice:
  return Choice(
    checkpoint=checkpoint,
    lora_weights=weights,
    accelerated=accelerated,
    steps=int(steps) or None,
    task=task or "",
    prompt=(prompt or "").strip(),
    num_frames=int(frames or 0) or None,
    seed=int(seed or 0),
  )


def _show_event(event: Status | FinishedSample) -> list[Any]:
  """Returns the updates of what `Page._build_result` has built."""
  if isinstance(event, Status):
    picture = gr.skip() if event.picture is None else gr.update(value=event.picture, visible=True)
    video = gr.skip() if event.picture is None else gr.update(value=None, visible=False)
    return [event.text, picture, video, *[gr.skip()] * 4, gr.update(visible=False), gr.update(visible=False)]
  shown: Sequence[Path] = (event.large, event.pairs, event.difference)
  return [
    event.text,
    *(update for path in shown for update in Viewer.show(path)),
    gr.update(value=str(event.bundle), visible=True),
    gr.update(value=event.command, visible=True),
  ]


@contextlib.contextmanager
def _shown_errors(*folders: str) -> Iterator[None]:
  """Shows users' errors on the page, without the folders of the files."""
  try:
    yield
  except (ValueError, OSError) as error:
    text = str(error)
    for folder in folders:
      text = text.replace(f"{folder}/", "")
    raise _page_error(text) from error


def _page_error(text: str) -> gr.Error:
  """Returns an error for the page to show, after a line in the log; Gradio prints no traceback of it."""
  log.warning("shown on the page: %s", text)
  return gr.Error(text, print_exception=False)


def _shorten_errors(file: gr.File) -> None:
  """Makes errors of an upload one line in the log; a subclass would do so, too, but Gradio writes a file next to it."""
  preprocess = file.preprocess

  def check(payload: Any) -> Any:
    try:
      return preprocess(payload)
    except gr.Error as error:
      raise _page_error(error.message) from error

  file.preprocess = check


def _name_parameters(function: Callable[..., Iterator[Any]], names: Sequence[str]) -> Callable[..., Iterator[Any]]:
  """Returns a function whose parameters have these names, which Gradio's API shows."""

  def call(*values: Any) -> Iterator[Any]:
    yield from function(*values)

  parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
  call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
  return call
