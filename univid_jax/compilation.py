"""Fast starts: traced and compiled programs that outlive the process, and no looking for garbage while they are made."""

import contextlib
import gc
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from univid_jax.files import CACHE_FOLDER, local_file

# Whose code stands in a trace.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "einops")


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


def kept_step(step: Callable[..., Any], *args: Any, folder: epath.PathLike, about: Any) -> Callable[..., Any]:
  """A training step as an earlier process traced it, which JAX's cache of compiled programs does not spare; else traced now.

  A kept trace is named by all that it depends on: this package's source, its libraries, JAX's options, the devices, the
  arguments' shapes, dtypes and shardings, and `about`. Code of other places that changes the step is not seen.

  Args:
    step: jitted, (state, ...) -> (state, ...); the state that goes in is given up.
    *args: abstract, with shardings.
    folder: where traces are kept, if there is room; may be deleted at any time.
    about: what the step was made from; its `repr` counts.

  Returns:
    A jitted step that does the same; the one that was given where JAX cannot keep it, as with cuDNN's calls or a print.
  """
  import jax
  from jax import export
  leaves, tree = jax.tree.flatten(args)
  state_tree = jax.tree.structure(args[0])
  known = _source(), *map(importlib.metadata.version, LIBRARIES), jax.config.values, jax.devices(), leaves, tree, about
  path = epath.Path(folder) / f"step-{hashlib.sha256(repr(known).encode()).hexdigest()}"
  if path.exists():
    exported = export.deserialize(bytearray(path.read_bytes()))
  else:
    def of_leaves(*leaves):
      state, *rest = step(*jax.tree.unflatten(tree, leaves))
      return jax.tree.leaves(state), *rest

    try:
      exported = export.export(jax.jit(of_leaves))(*leaves)
      content = exported.serialize()
    except (ValueError, NotImplementedError):  # what is wrong with the step itself is said again when it is compiled
      return step
    with contextlib.suppress(OSError), local_file(path) as unfinished:
      unfinished.write_bytes(content)

  def kept(*args):
    state, *rest = exported.call(*jax.tree.leaves(args))
    return jax.tree.unflatten(state_tree, state), *rest

  return jax.jit(kept, donate_argnums=0)


def _source() -> str:
  """This package's code, as one number."""
  files = sorted(Path(__file__).parent.rglob("*.py"))
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
