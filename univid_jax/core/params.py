"""Types of a model's parameters: nested dicts, and paths into them."""

from collections.abc import Mapping
from typing import Any

# Nested dicts of arrays, under the names of a model's modules.
ParamTree = Mapping[str, Any]
# The keys that lead to an array of a ParamTree.
ParamPath = tuple[str, ...]
