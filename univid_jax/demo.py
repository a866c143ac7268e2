"""A page in the browser: python -m univid_jax.demo --checkpoint=DIR, then drop A, A' and B, and see B'.

Needs the extra `demo` (Gradio). The page is served on this machine alone unless --host says otherwise.
"""

import tempfile
from pathlib import Path

from absl import flags

from univid_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint, or the workdir of a training run.", required=True)
LORA = flags.DEFINE_list("lora", [], "LoRA files or folders.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the model; bfloat16, or what a run was trained in.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen on; 0 takes one that is free.", lower_bound=0)

AS_GIVEN = "as the files are"


def main() -> None:
  try:
    import gradio  # noqa: F401
  except ModuleNotFoundError as error:
    raise cli.UserError("the demo needs Gradio: pip install 'univid_jax[demo]'") from error
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from univid_jax.pipeline import load_pipeline
  app = build_app(load_pipeline(CHECKPOINT.value, lora=LORA.value, dtype=DTYPE.value))
  app.launch(server_name=HOST.value, server_port=PORT.value or None, quiet=False)


def build_app(pipeline):
  """The page for a pipeline, a `gradio.Blocks`."""
  import gradio as gr

  from univid_jax.data.sentences import CONTEXTS, video_pattern
  from univid_jax.data.video import read_context, write_clip

  folder = Path(tempfile.mkdtemp(prefix="univid_"))

  def paint(a, a2, b, context, prompt, steps, seed, progress=gr.Progress()):  # noqa: B008 (how Gradio hands it over)
    if not all((a, a2, b)):
      raise gr.Error("give all three of A, A' and B")
    try:
      pattern = None if context == AS_GIVEN else video_pattern(context, 4)
      clips, fps = read_context((a, a2, b), num_frames=pipeline.num_frames, size=pipeline.size, videos=pattern)
      frames = None if pattern is None else pipeline.num_frames if pattern[-1] else 1
      out = pipeline.sample(clips, prompt, num_frames=frames, num_inference_steps=int(steps), seed=int(seed),
                            progress=lambda taken: progress((taken, int(steps)), unit="steps"))
    except (ValueError, OSError) as error:
      raise gr.Error(str(error)) from error
    is_image = len(out.frames) == 1
    path = folder / f"painted_{len(list(folder.iterdir()))}.{'png' if is_image else 'mp4'}"
    write_clip(path, out.frames, fps=fps)
    return gr.update(value=str(path) if is_image else None, visible=is_image), \
        gr.update(value=None if is_image else str(path), visible=not is_image)

  with gr.Blocks(title="univid_jax") as app:
    gr.Markdown("## Visual sentences\nA and A' show a task; the model paints B' for B. Images and videos of any size.")
    with gr.Row():
      clips = [gr.File(label=name, file_types=["image", "video"], type="filepath") for name in ("A", "A'", "B")]
    with gr.Row():
      context = gr.Dropdown([AS_GIVEN, *CONTEXTS], value=AS_GIVEN, label="Context (I: videos, II: images, III and IV mixed)")
      prompt = gr.Textbox(label="Prompt", value="")
      steps = gr.Slider(1, 100, value=50, step=1, label="Steps")
      seed = gr.Number(value=0, precision=0, label="Seed")
    button = gr.Button("Paint B'", variant="primary")
    image, video = gr.Image(label="B'", visible=True), gr.Video(label="B'", visible=False)
    button.click(paint, [*clips, context, prompt, steps, seed], [image, video], api_name="paint")
  return app


if __name__ == "__main__":
  cli.run(main)
