"""Lower bounds of the time of a training step on chips with known peaks."""

from benchmarks.programs import collective_bytes, memory_bytes
from univid_jax.config.schema import RunConfig
from univid_jax.platform.chips import Chip


def bound_seconds(
  config: RunConfig, text: str, *, rows: int, num_chips: int, chip: Chip
) -> tuple[dict[str, float], dict[str, float]]:
  """Returns lower bounds of a step's seconds, of which the largest applies, and the bytes of collectives by kind.

  Args:
    config: config of the run.
    text: text of the compiled step.
    rows: rows of a batch.
    num_chips: chips of the mesh.
    chip: kind of the chips, with its peaks.
  """
  from univid_jax.planning.estimates import step_operations

  collectives = collective_bytes(text, num_layers(config))
  seconds = {
    "compute": rows * step_operations(config) / num_chips / chip.flops,
    "memory": memory_bytes(text, num_layers(config)) / chip.bandwidth,
    "network": sum(collectives.values()) / chip.network,
  }
  return seconds, collectives


def num_layers(config: RunConfig) -> int:
  from univid_jax.checkpoints.run_parts import transformer_config

  return transformer_config(config).num_layers
