"""JAX's profiler."""

import jax


def profiler_options() -> jax.profiler.ProfileOptions:
  """Returns options of a trace without Python's calls, which would crowd out everything else."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  return options
