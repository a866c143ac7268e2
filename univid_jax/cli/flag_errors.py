"""What is wrong with a command line, in words, from the exceptions of absl and ml_collections."""

import difflib
import re
from collections.abc import Collection

from absl import flags

# What converting a value says if it fails, and what was expected.
_EXPECTED = (
  ("invalid literal for int", "a whole number"),
  ("could not convert string to float", "a number"),
  ("Non-boolean argument", "true or false"),
)
# What others call our flags.
_SYNONYMS = {
  "num_inference_steps": "steps",
  "image": "clips",
  "video": "clips",
  "height": "size",
  "width": "size",
  "model": "checkpoint",
  "output": "out",
  "lora_scale": "lora",
  "enable_model_cpu_offload": "offload_inactive",
}
# How similar the name of a flag is that is suggested for one that is unknown: ckpt and checkpoint are by 0.57.
_SIMILARITY = 0.5


def explain_flag(error: flags.Error, known: Collection[str]) -> str:
  """Returns what is wrong with a flag.

  Args:
    error: from parsing the command line.
    known: names of the flags that exist.
  """
  if isinstance(error, flags.UnrecognizedFlagError):
    name, dot, rest = error.flagname.lstrip("-").partition(".")
    similar = [same for same in [_SYNONYMS.get(name)] if same in known]
    similar = similar or difflib.get_close_matches(name, known, n=1, cutoff=_SIMILARITY)
    hint = f"did you mean --{similar[0]}{dot}{rest}? " if similar else ""
    return f"unknown flag --{name}{dot}{rest}: {hint}--help lists all"
  text = re.sub(r"\('(.*)', '.*'\)$", r"\1", str(error))  # absl shows a pair as it is
  match = re.match(r"flag --([^=]+)=(.*?): (.+)", text, re.DOTALL)
  for beginning, expected in _EXPECTED:
    if match and match[3].startswith(beginning):
      return f"--{match[1]} must be {expected}, got {match[2]!r}"
  if match and match[3].endswith("must have a value other than None."):
    return f"give --{match[1]}; see --help"
  return text
