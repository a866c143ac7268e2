"""The annotations of modules with shapes are checked while the tests run."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import univid_jax
from tests.typecheck import unchecked
from univid_jax.core import dims
from univid_jax.core.packed_row import take_tokens
from univid_jax.data.media.schedule import Schedule
from univid_jax.training.state import TrainState

TOKENS = jnp.zeros((2, 3, 4))


def test_shapes_of_arguments_agree():
  with pytest.raises(TypeCheckError, match="indices"):
    take_tokens(TOKENS, jnp.zeros((1, 5), jnp.int32))
  with unchecked():
    take_tokens(TOKENS, jnp.zeros((1, 5), jnp.int32))
  assert take_tokens(TOKENS, jnp.zeros((2, 5), jnp.int32)).shape == (2, 5, 4)


def test_fields_of_dataclasses_are_checked():
  with pytest.raises(TypeCheckError, match="times"):
    Schedule(np.zeros(3), 1, 1, 1.0)
  TrainState(step=TOKENS, params={}, ema=None, opt_state=None)  # @no_type_check


def test_letters_of_dims_are_defined():
  letters = {letter for part in re.findall(r"\b((?:\w, )*\w)  \w", dims.__doc__) for letter in part.split(", ")}
  used: dict[str, str] = {}
  for path in Path(univid_jax.__file__).parent.rglob("*.py"):
    for shape in re.findall(
      r'\b(?:Bool|Float|Int|Integer|Shaped|UInt8|UInt16)\[[^"\]]+, "([^"]*)"\]', path.read_text()
    ):
      used |= {dim.strip("_#*"): path.name for dim in shape.split()}
  assert len(used) > len(letters) > 20
  assert {dim: name for dim, name in used.items() if dim.isalpha() and len(dim) == 1 and dim not in letters} == {}
