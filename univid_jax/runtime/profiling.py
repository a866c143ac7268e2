"""JAX's profiler."""

import jax


def profiler_options() -> jax.profiler.ProfileOptions:
  """Returns options for a trace without Python calls, which would crowd out everything else."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  return options
