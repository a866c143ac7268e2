"""Carries weights between PyTorch's Wan2.1 and this project.

  python -m tools.convert_weights SRC DST [--to=jax|original|diffusers|comfyui|musubi|univid] [--dtype=...]
  python -m tools.convert_weights --inspect SRC
  python -m tools.convert_weights --verify SRC DST

SRC is the folder of an official release or of diffusers, a file of one component, a LoRA file of any trainer, or this project's
own checkpoint folder, LoRA folder or workdir of a LoRA training. What it is is found from the names and shapes of its tensors.
"""


from absl import flags

from univid_jax import cli

TO = flags.DEFINE_enum("to", "jax", ["jax", "original", "diffusers", "comfyui", "musubi", "univid"],
                       "Whose layout to write: base weights go to jax, original or diffusers, LoRAs to any but original.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float16", "float32"], "Of the written weights; as they are by default.")
FORCE = flags.DEFINE_bool("force", False, "Replace DST where it exists.")
ALLOW_MISSING = flags.DEFINE_multi_string("allow_missing", [], "Official names (with * and ?) that SRC may lack.")
INSPECT = flags.DEFINE_bool("inspect", False, "Only say what SRC is.")
VERIFY = flags.DEFINE_bool("verify", False, "Convert (where DST is not there yet), compare with SRC and say whether all is well.")


def main(*arguments: str) -> None:
  if len(arguments) != (1 if INSPECT.value else 2):
    raise cli.UserError(f"give {'SRC' if INSPECT.value else 'SRC and DST'}, got {len(arguments)} arguments; --help says more")
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from tools.convert_weights import commands
  if INSPECT.value:
    print(commands.inspect(arguments[0]))
  elif VERIFY.value:
    text, ok = commands.verify(*arguments, allow_missing=ALLOW_MISSING.value)
    print(text)
    if not ok:
      raise cli.UserError("the conversion is NOT right; see above")
  else:
    print(commands.convert_any(*arguments, to=TO.value, dtype=DTYPE.value, force=FORCE.value, allow_missing=ALLOW_MISSING.value))


if __name__ == "__main__":
  cli.run(main, num_arguments=2)
