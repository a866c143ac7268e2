"""The page of the demo, in Gradio."""

import tempfile
from pathlib import Path

import gradio as gr

from univid_jax import Pipeline
from univid_jax.data.clips import frame_rate, read_context
from univid_jax.data.contexts import CONTEXTS, video_pattern
from univid_jax.data.writer import write_clip

AS_GIVEN = "as the files are"


def build_page(pipeline: Pipeline) -> gr.Blocks:
  """Builds the page for a pipeline."""
  folder = Path(tempfile.mkdtemp(prefix="univid_"))
  fixed = pipeline.accelerator.num_inference_steps if pipeline.accelerator else None

  def sample(a, a2, b, context, prompt, steps, seed, progress=gr.Progress()):  # noqa: B008 (Gradio's way to pass it)
    if not all((a, a2, b)):
      raise gr.Error("choose files for A, A' and B")

    total = None if fixed else int(steps)

    def show(taken: int) -> None:
      progress((taken, total or fixed), unit="steps")

    try:
      pattern = None if context == AS_GIVEN else video_pattern(context, 4)
      clips = read_context((a, a2, b), pipeline.clip_format, videos=pattern)
      num_frames = None if pattern is None else pipeline.num_frames if pattern[-1] else 1
      out = pipeline.sample(
        [clip.frames for clip in clips],
        prompt,
        num_frames=num_frames,
        num_inference_steps=total,
        seed=int(seed),
        progress=show,
      )
    except (ValueError, OSError) as error:
      raise gr.Error(str(error)) from error
    is_image = len(out.frames) == 1
    path = folder / f"sample_{len(list(folder.iterdir()))}.{'png' if is_image else 'mp4'}"
    write_clip(path, out.frames, fps=frame_rate(clips))
    return gr.update(value=str(path) if is_image else None, visible=is_image), gr.update(
      value=None if is_image else str(path), visible=not is_image
    )

  with gr.Blocks(title="univid_jax") as page:
    gr.Markdown("## Visual sentences\nA and A' show a task; the model applies it to B. Images and videos of any size.")
    with gr.Row():
      clips = [gr.File(label=name, file_types=["image", "video"], type="filepath") for name in ("A", "A'", "B")]
    with gr.Row():
      context = gr.Dropdown(
        [AS_GIVEN, *CONTEXTS], value=AS_GIVEN, label="Context (I: videos, II: images, III and IV: mixed)"
      )
      prompt = gr.Textbox(label="Prompt", value="")
      steps = gr.Slider(1, 100, value=fixed or 50, step=1, label="Steps", interactive=not fixed)
      seed = gr.Number(value=0, precision=0, label="Seed")
    button = gr.Button("Sample B'", variant="primary")
    image, video = gr.Image(label="B'", visible=True), gr.Video(label="B'", visible=False)
    button.click(sample, [*clips, context, prompt, steps, seed], [image, video], api_name="sample")
  return page
