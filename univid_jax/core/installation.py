"""Commands that add missing extras to this installation: the package is not on PyPI."""

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PACKAGE = "univid_jax"


def install_command(extra: str) -> str:
  """Returns the command that adds an extra to this installation: from its clone, or from where pip got the package."""
  clone = Path(__file__).parents[2]
  if (clone / "setup.cfg").is_file():
    return _pip("." if clone == Path.cwd() else str(clone), extra, "-e ")
  origin = _origin()
  url = str(origin.get("url", ""))
  if "vcs_info" in origin:
    vcs, commit = origin["vcs_info"]["vcs"], origin["vcs_info"].get("commit_id")
    return f"pip install '{PACKAGE}[{extra}] @ {vcs}+{url}{'@' * bool(commit)}{commit or ''}'"
  if url.startswith("file://"):
    return _pip(unquote(url.removeprefix("file://")), extra)
  return f"{_pip('.', extra, '-e ')} in a clone of the repository"


def _pip(source: str, extra: str, options: str = "") -> str:
  return f"pip install {options}{shlex.quote(f'{source}[{extra}]')}"


def _origin() -> dict[str, Any]:
  """Returns where pip got the package from (PEP 610); empty if that is not recorded."""
  try:
    return json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
  except (metadata.PackageNotFoundError, ValueError):
    return {}
