"""How the parameters of a model are named: in nested dicts, or by path."""

from collections.abc import Mapping
from typing import Any

# Nested dicts of arrays, under the names of a model's modules.
ParamTree = Mapping[str, Any]
# The keys that lead to an array of such a tree.
ParamPath = tuple[str, ...]
