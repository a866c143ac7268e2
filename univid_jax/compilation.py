"""Fast starts: compiled programs that outlive the process, and no looking for garbage while they are made."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

from univid_jax.files import CACHE_FOLDER


def keep_programs(folder: str | None = None) -> str:
  """Turns on JAX's persistent compilation cache; call before anything is compiled.

  Args:
    folder: by default JAX's own choice where it has one (JAX_COMPILATION_CACHE_DIR), else ~/.cache/univid_jax/programs.

  Returns:
    Where programs are kept. The folder may be deleted at any time.
  """
  import jax
  chosen = folder or jax.config.jax_compilation_cache_dir or str(Path(CACHE_FOLDER).expanduser() / "programs")
  jax.config.update("jax_compilation_cache_dir", chosen)
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  return chosen


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
  """Keeps Python from looking for garbage, as `with uncollected():` or `@uncollected()`.

  For imports and for tracing, which make a great many objects and drop few: looking through them is a tenth of a start.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()
