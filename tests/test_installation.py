"""Commands that messages print to install what is missing."""

import json
from pathlib import Path

import pytest

from univid_jax.core import installation
from univid_jax.core.installation import install_command

CLONE = Path(installation.__file__).parents[2]


def test_in_a_clone(monkeypatch, tmp_path):
  monkeypatch.chdir(CLONE)
  assert install_command("demo") == "pip install -e '.[demo]'"
  monkeypatch.chdir(tmp_path)
  assert install_command("demo") == f"pip install -e '{CLONE}[demo]'"


@pytest.mark.parametrize(
  "origin, command",
  [
    (
      {"url": "https://host/u.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
      "pip install 'univid_jax[demo] @ git+https://host/u.git@abc'",
    ),
    ({"url": "file:///my%20clone", "dir_info": {}}, "pip install '/my clone[demo]'"),
    ({}, "pip install -e '.[demo]' in a clone of the repository"),
  ],
)
def test_elsewhere_it_comes_from_where_pip_had_it(monkeypatch, tmp_path, origin, command):
  """There is no univid_jax on PyPI, so its name alone installs nothing."""

  class Distribution:
    def read_text(self, name):
      return json.dumps(origin) if name == "direct_url.json" and origin else None

  monkeypatch.setattr(installation, "__file__", str(tmp_path / "lib" / "univid_jax" / "core" / "installation.py"))
  monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
  assert install_command("demo") == command
