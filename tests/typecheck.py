"""Checks the annotations of modules with shapes while the tests run. See CONTRIBUTING.md.

`conftest` has jaxtyping decorate every function and dataclass of these modules. `typing.no_type_check` exempts one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Callable[..., Any]] = {}


def modules_with_shapes() -> list[str]:
  """Returns the names of the package's modules that annotate shapes.

  Types alone are the type checker's business: a decorated call takes up to 50 us longer, which in all modules is a
  sixth of the tests' time.
  """
  root = Path(__file__).parent.parent
  paths = [path for path in root.glob("univid_jax/**/*.py") if "from jaxtyping import" in path.read_text()]
  return [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function with its arguments and result checked.

  jaxtyping passes a function without a body that has the signature to check. A nested function is decorated each time
  the function around it is called, which is quick only because what beartype makes is kept.
  """
  key = (function.__module__, function.__qualname__, tuple(function.__annotations__.items()))
  if key not in _checked:
    _checked[key] = _beartype(function)
  return _checked[key]


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """Allows calls with values of wrong types, to test what the package itself does about them."""
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)
