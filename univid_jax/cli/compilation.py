"""JAX's persistent compilation cache."""

import os

from univid_jax.core.paths import CACHE_FOLDER


def enable_compilation_cache() -> None:
  """Keeps compiled programs for the next start; call before anything is compiled.

  JAX's own variables win: JAX_COMPILATION_CACHE_DIR (default here: ~/.cache/univid_jax/programs, which may be deleted
  at any time) and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS (default here: 0.5).
  """
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(CACHE_FOLDER), "programs"))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
