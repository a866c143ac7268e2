"""The transformers of a model: one for all noise levels, or Wan2.2 A14B's experts for high and for low noise."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.core.params import ParamTree
from univid_jax.models.quantized import quantization_of


class OffloadedParams:
  """Parameters that wait in host memory until they are used.

  Args:
    params: on devices; they can be deleted afterwards.

  Attributes:
    values: in host memory.

  Raises:
    UserError: a part of them is on devices of another process.
  """

  def __init__(self, params: ParamTree):
    if not all(x.is_fully_addressable for x in jax.tree.leaves(params)):
      raise UserError("an expert that several processes share cannot wait in host memory: leave out offload_inactive")
    self._shardings = jax.tree.map(lambda x: x.sharding, params)
    self.values = jax.device_get(params)

  def load(self) -> ParamTree:
    """Copies them to their devices."""
    return jax.device_put(self.values, self._shardings)


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A transformer.

  Attributes:
    graph: its structure, without parameters.
    params: its parameters.
  """

  graph: nnx.GraphDef
  params: ParamTree | OffloadedParams

  @property
  def is_offloaded(self) -> bool:
    """Whether its parameters are in host memory."""
    return isinstance(self.params, OffloadedParams)

  @property
  def values(self) -> ParamTree:
    """Its parameters, wherever they are."""
    return self.params.values if isinstance(self.params, OffloadedParams) else self.params

  def load(self) -> ParamTree:
    """Returns its parameters on their devices."""
    return self.params.load() if isinstance(self.params, OffloadedParams) else self.params

  def offload(self) -> "Transformer":
    """Returns the transformer with its parameters in host memory."""
    assert not isinstance(self.params, OffloadedParams)
    return Transformer(self.graph, OffloadedParams(self.params))


@dataclasses.dataclass(frozen=True)
class Experts:
  """Transformers by noise level.

  Attributes:
    transformers: the only one, or the high-noise and the low-noise expert.
    boundary: the noise level from which the high-noise expert is used.
  """

  transformers: Sequence[Transformer]
  boundary: float

  def find(self, sigma: float) -> int:
    """Returns the index of the transformer for a noise level."""
    # In float32, like the noise levels of solvers: 0.9 belongs to the high-noise expert.
    return 0 if len(self.transformers) == 1 or np.float32(sigma) >= np.float32(self.boundary) else 1

  def load(self, index: int) -> ParamTree:
    """Returns the parameters of a transformer, on their devices."""
    return self.transformers[index].load()

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the kernels; LoRAs make other parameters float32."""
    return self.transformers[0].values["patch_embedding"]["kernel"].dtype

  @property
  def quantize(self) -> Quantize:
    """How the linear weights of the blocks are stored."""
    return quantization_of(self.transformers[0].values)

  def guidance_scales(self, scale: float | Sequence[float]) -> tuple[float, ...]:
    """Returns the guidance scale of each transformer, see `split_guidance`."""
    return split_guidance(scale, len(self.transformers))

  def are_guided(self, scale: float | Sequence[float]) -> bool:
    """Returns whether a guidance scale, see `guidance_scales`, needs the negative prompt."""
    return set(self.guidance_scales(scale)) != {1.0}


def split_guidance(scale: float | Sequence[float], count: int) -> tuple[float, ...]:
  """Returns the guidance scale of each of `count` transformers.

  Args:
    scale: one, or those of the low-noise and the high-noise expert, in this order.
    count: of transformers.

  Raises:
    UserError: there are two, but only one transformer, or another number; or one is not finite.
  """
  scales = tuple(np.atleast_1d(np.asarray(scale, np.float64)).tolist())
  if len(scales) not in (1, count):
    expected = "one number" if count == 1 else "one number, or two for low and high noise"
    raise UserError(f"guidance_scale must be {expected}, got {len(scales)}")
  if not all(map(math.isfinite, scales)):
    raise UserError(f"the guidance scale must be finite, got {', '.join(map(str, scales))}")
  return scales * count if len(scales) == 1 else scales[::-1]
