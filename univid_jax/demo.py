"""Serves a web page that samples B' for A, A' and B.

  python -m univid_jax.demo --checkpoint=DIR [--lora=PATH] [--host=HOST] [--port=PORT]

Needs the extra `demo` (Gradio). The page is only reachable from this machine unless --host says otherwise; it serves
only what was uploaded to it and what it sampled.
"""

import sys
from typing import Any

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
CHECKPOINT, LORA, DTYPE, QUANTIZE = FLAGS.checkpoint(), FLAGS.lora(), FLAGS.dtype(), FLAGS.quantize()
ACCELERATE = FLAGS.accelerate()
LORA_SKIP_UNMATCHED, VERIFICATION = FLAGS.lora_skip_unmatched(), FLAGS.verification()
OFFLOAD_INACTIVE = FLAGS.offload_inactive()
HOST = FLAGS.string("host", "127.0.0.1", "Address to listen on.")
MAX_UPLOAD = FLAGS.integer("max_upload_mb", 200, "Largest file that is accepted, in MB.", lower_bound=1)
MAX_QUEUE = FLAGS.integer("max_queue", 16, "Requests that may wait; more are refused.", lower_bound=1)
PORT = FLAGS.integer("port", 7860, "Port to listen on; 0 takes a free one.", lower_bound=0)


@app.command(FLAGS)
def main() -> None:
  try:
    import gradio  # noqa: F401
  except ModuleNotFoundError as error:
    raise UserError("the demo needs Gradio: pip install 'univid_jax[demo]'") from error
  import univid_jax
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.page import build_page
  from univid_jax.cli.sampling import group_loras, parse_lora

  enable_compilation_cache()
  loras = [parse_lora(item) for item in LORA.value]
  flags = (DTYPE, QUANTIZE, LORA_SKIP_UNMATCHED, OFFLOAD_INACTIVE)
  options: dict[str, Any] = {flag.name: flag.value for flag in flags}
  options |= VERIFICATION.value
  options["accelerate"] = ACCELERATE.value or None
  pipeline = univid_jax.load_pipeline(CHECKPOINT.value, lora=group_loras(loras), **options)
  page = build_page(pipeline)
  page.queue(max_size=MAX_QUEUE.value, default_concurrency_limit=1)
  page.launch(
    server_name=HOST.value,
    server_port=PORT.value or None,
    max_file_size=f"{MAX_UPLOAD.value}mb",
    share=False,
    quiet=False,
  )


if __name__ == "__main__":
  sys.exit(main())
