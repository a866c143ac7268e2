"""Skips training steps whose loss or gradient is not finite, or whose gradient is far larger than usual."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

# Number of norms whose median counts as usual, and the minimum before a norm can be too large.
WINDOW, MIN_NORMS = 64, 8
# A run that skips this many steps in a row has diverged.
MAX_SKIPPED_IN_A_ROW = 50


class GuardState(NamedTuple):
  """The state of a guarded optimizer: everything the next decision depends on, so that a resumed run decides the same.

  Attributes:
    inner: state of the optimizer.
    norms: ring buffer of the norms of the last gradients that were used; NaN where there is none yet.
    num_used: number of gradients that were used.
    skipped_in_a_row: number of steps skipped since the last one that was not.
  """

  inner: Any
  norms: Float[Array, "window"]
  num_used: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]

  @property
  def has_skipped(self) -> Bool[Array, ""]:
    """Whether the last step was skipped."""
    return self.skipped_in_a_row > 0


def global_norm(tree: optax.Params) -> Float[Array, ""]:
  """Returns the L2 norm of a tree, in float32, since bfloat16 would lose small squares in the sum."""
  return optax.tree_utils.tree_norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def skip_bad_steps(optimizer: optax.GradientTransformation, *, skip_norm: float) -> optax.GradientTransformation:
  """Returns an optimizer that leaves parameters and its own state as they are in a bad step.

  Its `update` takes the loss as an extra argument.

  Args:
    optimizer: the optimizer to guard.
    skip_norm: a gradient is bad if its norm exceeds this multiple of the median; 0 accepts all that are finite.
  """

  def init(params: optax.Params) -> GuardState:
    zero = jnp.zeros((), jnp.int32)
    return GuardState(optimizer.init(params), jnp.full(WINDOW, jnp.nan), zero, zero)

  def update(updates: Any, state: Any, params: Any = None, *, loss: Array, **_: Any) -> tuple[Any, GuardState]:
    norm = global_norm(updates)
    is_bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if skip_norm:
      is_bad |= (state.num_used >= MIN_NORMS) & (norm > skip_norm * jnp.nanmedian(state.norms))
    new_updates, inner = optimizer.update(updates, state.inner, params)
    used = GuardState(
      inner, state.norms.at[state.num_used % WINDOW].set(norm), state.num_used + 1, jnp.zeros((), jnp.int32)
    )
    skipped = state._replace(skipped_in_a_row=state.skipped_in_a_row + 1)
    no_updates = jax.tree.map(jnp.zeros_like, new_updates)
    return jax.tree.map(lambda bad, good: jnp.where(is_bad, bad, good), (no_updates, skipped), (new_updates, used))

  # optax's protocol requires all extra arguments to be optional.
  return optax.GradientTransformationExtraArgs(init, cast(Any, update))
