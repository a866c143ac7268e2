"""Serves a web page that samples B' for A, A' and B.

  python -m univid_jax.demo [--checkpoint=DIR] [--lora=PATH] [--host=HOST] [--port=PORT]

Needs the extra `demo` (Gradio). Without --checkpoint it offers small, the base in the package, and the runs in runs/.
The page is only reachable from this machine unless --host says otherwise; it serves only what was uploaded to it and
what it sampled.
"""

import errno
import logging
import socket
import sys
import tempfile
from pathlib import Path

from univid_jax.checkpoints.built_in import BUILT_IN
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.core.installation import install_command

FLAGS = CommandFlags(__doc__)
CHECKPOINT = FLAGS.paths(
  "checkpoint", [], "Checkpoints or workdirs to choose from; the first is loaded at start. Default: small and runs/*."
)
LORA, ACCELERATE = FLAGS.lora(), FLAGS.accelerate()
# For every model that is chosen, as `sample` takes them.
FLAGS.dtype()
FLAGS.quantize()
LORA_SKIP_UNMATCHED = FLAGS.lora_skip_unmatched()
FLAGS.offload_inactive()
FLAGS.run_verification()
MODEL_FLAGS = (
  "dtype", "quantize", "lora_skip_unmatched", "offload_inactive", "verify_weights", "on_damaged_checkpoint"
)  # fmt: skip
LOCALHOST = "127.0.0.1"
HOST = FLAGS.string("host", LOCALHOST, "Address to listen on.")
MAX_UPLOAD = FLAGS.integer("max_upload_mb", 200, "Largest file that is accepted, in MiB.", lower_bound=1)
MAX_QUEUE = FLAGS.integer("max_queue", 16, "Requests that may wait; more are refused.", lower_bound=1)
PORT = FLAGS.integer("port", 7860, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535)

log = logging.getLogger("univid_jax.demo")


@app.command(FLAGS)
def main() -> None:
  if not (LORA.value or ACCELERATE.value):
    FLAGS.refuse("no LoRA is added to the models", [LORA_SKIP_UNMATCHED.name])
  require_free(HOST.value, PORT.value)  # before seconds of imports
  log.info("loading %s; the address of the page follows", (CHECKPOINT.value or BUILT_IN)[0])
  try:
    import gradio  # noqa: F401
  except ModuleNotFoundError as error:
    raise UserError(f"the demo needs Gradio: {install_command('demo')}") from error
  from univid_jax.checkpoints.experts import split_loras
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.page import CSS, Page
  from univid_jax.cli.page_messages import short_paths
  from univid_jax.cli.page_session import Offer, Session, find_checkpoints

  enable_compilation_cache()
  offer = Offer(
    checkpoints=CHECKPOINT.value or find_checkpoints(),
    loras=split_loras(LORA.value),
    distillation=ACCELERATE.value,
    flags=FLAGS.given(MODEL_FLAGS),
  )
  session = Session(offer)
  session.open(session.first_choice())
  with tempfile.TemporaryDirectory(prefix="univid_") as folder, short_paths(Path(folder)):
    page = Page(session, Path(folder)).build()
    page.queue(max_size=MAX_QUEUE.value, default_concurrency_limit=1)
    _, address, _ = page.launch(
      server_name=HOST.value,
      server_port=PORT.value or None,
      max_file_size=f"{MAX_UPLOAD.value}mb",
      share=False,
      css=CSS,
      quiet=True,
      prevent_thread_lock=True,
    )
    log.info("the page is at %s (Ctrl-C ends it)", address)
    page.block_thread()


def require_free(host: str, port: int) -> None:
  """Checks that a page can be served at an address, before a model is loaded; port 0 takes a free one.

  Raises:
    UserError: another program listens there, or the address is none of this machine.
  """
  for name in dict.fromkeys((LOCALHOST, host.strip("[]"))):  # Gradio reaches its own page through the first
    try:
      family, *_, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
      socket.create_server(address[:2], family=socket.AddressFamily(family)).close()
    except OSError as error:
      if error.errno == errno.EADDRINUSE:
        raise UserError(f"port {port} is in use: choose another one with --port, or 0 for a free one") from error
      raise UserError(f"cannot listen on port {port} of --host={host}: {error.strerror}") from error


if __name__ == "__main__":
  sys.exit(main())
