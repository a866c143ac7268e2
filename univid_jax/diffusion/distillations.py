"""Sampling settings of step-distillation LoRAs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from univid_jax.core.errors import UserError
from univid_jax.core.options import SolverName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
  """A kind of distillation, with the only sampling settings that it was trained for.

  Attributes:
    name: name of the kind.
    solver: name of the solver.
    num_inference_steps: steps of the solver.
    shift: shift of the noise levels towards noise.
    guidance_scale: 1 is no guidance: step-distilled models need none.
    pattern: regular expression that matches names or metadata of its files.
  """

  name: str
  solver: SolverName = SolverName.DISTILLED
  num_inference_steps: int = 4
  shift: float = 5.0
  guidance_scale: float = 1.0
  pattern: str


# Both as LightX2V publishes them, also for both experts of Wan2.2 A14B: configs/distill/ and configs/wan22/
# wan_moe_{t2v,i2v}_distill.json, https://github.com/ModelTC/LightX2V (Apache-2.0). Steps are Euler's, as in its
# scheduler for Wan2.2; its scheduler for Wan2.1 draws new noise before every step, at the same levels.
DISTILLATIONS: Mapping[str, Distillation] = {
  kind.name: kind
  for kind in (
    Distillation(name="lightx2v", pattern=r"light[ _.-]?x2v|step[ _.-]?distill"),
    Distillation(name="lightning", pattern=r"lightning"),
  )
}
DEFAULT_DISTILLATION = DISTILLATIONS["lightx2v"]

# Distillations of other methods, whose noise levels differ or are drawn again in every step.
_OTHERS = r"caus[ _.-]?vid|acc[ _.-]?vid|fast[ _.-]?wan|(?<![a-z])(rcm|lcm|pcm|dmd2?|hyper|turbo)(?![a-z])|fusionx"


def find_distillation(name: str) -> Distillation:
  """Returns a kind by name.

  Raises:
    UserError: it is not known.
  """
  if name not in DISTILLATIONS:
    raise UserError(f"unknown kind of distillation {name!r}; there are {', '.join(DISTILLATIONS)}")
  return DISTILLATIONS[name]


def infer_distillation(source: str, texts: Sequence[str]) -> Distillation:
  """Infers the kind of a distillation LoRA from its name and metadata; `DEFAULT_DISTILLATION` if they name none.

  Args:
    source: names the LoRA in messages.
    texts: its name and metadata.

  Raises:
    UserError: they mention another method.
  """
  text = "\n".join(texts).lower()
  found = [kind for kind in DISTILLATIONS.values() if re.search(kind.pattern, text)]
  other = re.search(_OTHERS, text)
  if other:
    raise UserError(
      f"{source} mentions {other[0]!r}, which is sampled in another way: if it is nevertheless one of "
      f"{', '.join(DISTILLATIONS)}, name its kind with PATH:KIND"
    )
  # Some files mention both kinds, which are sampled in the same way.
  return found[0] if found else DEFAULT_DISTILLATION
