"""How evenly the work of a step is spread over devices."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from univid_jax.config.schema import RowsConfig
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.models.flops import step_flops
from univid_jax.models.variants import DiTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkCounter:
  """Counts the work of rows and devices, in operations of a training step as for `mfu`.

  Everything but attention is counted for padding too: rows have equal shapes.

  Attributes:
    shape: shape of the transformer.
    lora_rank: rank of its adapters; 0 if the whole transformer is trained.
    rows: the run's config of rows.
    layout: layout of a batch.
  """

  shape: DiTConfig
  lora_rank: int
  rows: RowsConfig
  layout: BatchLayout

  def count(
    self, attended: Float[np.ndarray, "b"], attended_text: Float[np.ndarray, "b"]
  ) -> Float[np.ndarray, "devices microbatches"]:
    """Returns the work of each device, given the pairs that attention computes for each row of a batch.

    Args:
      attended, attended_text: see `models.flops.forward_flops`.
    """
    work = [
      step_flops(
        self.shape,
        lora_rank=self.lora_rank,
        tokens=self.rows.num_tokens,
        text_tokens=self.rows.num_text_tokens,
        targets=self.rows.target_tokens,
        attended=float(pairs),
        attended_text=float(text_pairs),
      )
      for pairs, text_pairs in zip(attended, attended_text, strict=True)
    ]
    return self.layout.sum_work(np.array(work))

  def count_used(self, *, tokens: float, attended: float, attended_text: float, targets: float) -> float:
    """Returns the work of a whole batch without padding; arguments as for `step_flops`."""
    return step_flops(
      self.shape,
      lora_rank=self.lora_rank,
      tokens=tokens,
      text_tokens=self.layout.num_rows * self.rows.num_text_tokens,
      attended=attended,
      attended_text=attended_text,
      targets=targets,
    )

  def balance(self, steps: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Returns the mean work of a device over that of the slowest one, which the others wait for in each microbatch.

    Args:
      steps: the metrics of each step.
    """
    work = np.stack([self.count(step["attended"], step["attended_text"]) for step in steps])
    return float(work.mean(1).sum() / work.max(1).sum())
