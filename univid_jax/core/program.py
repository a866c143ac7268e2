"""How the commands of this package are spelled in messages."""

import os
import re
import sys


def spell_commands(text: str) -> str:
  """Returns text with `univid-NAME` for `python -m univid_jax.NAME` if the program was called by such a name."""
  if not os.path.basename(sys.argv[0]).startswith("univid-"):
    return text
  return re.sub(r"python -m univid_jax\.(\w+)", r"univid-\1", text)
