"""Converts weights between PyTorch's Wan and this project.

  python -m univid_jax.convert SRC DST [--to=jax|original|diffusers|comfyui|musubi|univid] [--dtype=DTYPE]
                                      [--quantize=int8|fp8|nf4] [--step=STEP|best]
  python -m univid_jax.convert --inspect SRC
  python -m univid_jax.convert --verify SRC DST

SRC is the folder of an official release or of diffusers, a file of one or more components (ComfyUI's, GGUF, ...), a
LoRA file of any trainer, a folder of PEFT, or this project's checkpoint folder, LoRA folder, or workdir of a run, of
which --step chooses a checkpoint. Its type is inferred from tensor names and shapes.
"""

import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.errors import UserError

# Written out, as their tables import JAX: `convert.export.LAYOUTS` and `checkpoints.lora.formats.FORMATS`.
DESTINATIONS = ["jax", "original", "diffusers", "comfyui", "musubi", "univid"]

FLAGS = CommandFlags(__doc__, max_arguments=2)
TO = FLAGS.choice("to", "jax", DESTINATIONS, "Base weights: jax, original or diffusers. LoRAs: all but original.")
DTYPE = FLAGS.choice(
  "dtype",
  None,
  ["bfloat16", "float16", "float32"],
  "Dtype of the written weights; default: unchanged; quantised ones become what holds them exactly.",
)
QUANTIZE = FLAGS.choice(
  "quantize",
  None,
  ["int8", "fp8", "nf4"],
  "Quantise the linear weights of the transformer's blocks; for a frozen base. fp8 keeps 8-bit floats of SRC.",
)
FORCE = FLAGS.switch("force", False, "Replace DST, if it is empty or univid-convert wrote it.")
ALLOW_MISSING_HELP = "An official name, with * and ?, that SRC, files of PyTorch, may lack."
ALLOW_MISSING = FLAGS.repeated("allow_missing", [], ALLOW_MISSING_HELP)
INSPECT = FLAGS.switch("inspect", False, "Only describe SRC.")
LORA_SKIP_UNMATCHED, STEP = FLAGS.lora_skip_unmatched(), FLAGS.step()
VERIFY_HELP = (
  "Convert, without options, unless DST exists, then compare tensors, and with the extra `parity` outputs with "
  "PyTorch's."
)
VERIFY = FLAGS.switch("verify", False, VERIFY_HELP)
# What changes the result of a conversion.
OPTIONS = (TO, DTYPE, QUANTIZE, FORCE, LORA_SKIP_UNMATCHED)


@app.command(FLAGS)
def main() -> None:
  names = ("SRC",) if INSPECT.value else ("SRC", "DST")
  if len(FLAGS.arguments) != len(names):
    raise UsageError(f"expected {' and '.join(names)}, got {len(FLAGS.arguments)} arguments; see --help")
  if VERIFY.value and STEP.value is not None:
    raise UsageError("--verify compares releases, which have no steps: leave out --step")
  options = [flag.name for flag in OPTIONS]
  if INSPECT.value:
    FLAGS.refuse("--inspect only describes SRC", [VERIFY.name, *options, ALLOW_MISSING.name])
  elif VERIFY.value:
    FLAGS.refuse("--verify converts without options, or compares what is there already", options)
  from univid_jax.convert import commands

  source, *destination = FLAGS.arguments
  if INSPECT.value:
    print(commands.inspect(source, step=STEP.value))
  elif VERIFY.value:
    text, is_right = commands.verify(source, *destination, allow_missing=ALLOW_MISSING.value)
    print(text)
    if not is_right:
      raise UserError("the conversion is NOT right; see above")
  else:
    print(
      commands.convert_any(source, *destination, **{flag.name: flag.value for flag in (*OPTIONS, ALLOW_MISSING, STEP)})
    )


if __name__ == "__main__":
  sys.exit(main())
