"""python -m tools.convert_weights in a clone: the same as univid-convert."""

import sys

from univid_jax.convert.__main__ import main

if __name__ == "__main__":
  sys.exit(main())
