"""Checks that files and functions of the package are short; prints those that are not, and then exits with 1."""

import ast
import sys
from pathlib import Path

MAX_FILE, MAX_FUNCTION = 350, 60


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  """Returns the lines of a function with its signature, but without its docstring."""
  first = function.body[0]
  docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
  return function.end_lineno - function.lineno + 1 - docstring


failures = []
for path in sorted(Path("univid_jax").rglob("*.py")):
  text = path.read_text()
  if (lines := len(text.splitlines())) > MAX_FILE:
    failures.append(f"{path}: {lines} lines, at most {MAX_FILE}")
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_FUNCTION:
      failures.append(f"{path}:{node.lineno}: {node.name} has {length(node)} lines, at most {MAX_FUNCTION}")
print("\n".join(failures), end="\n" if failures else "")
sys.exit(bool(failures))
