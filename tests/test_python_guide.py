"""The snippets of docs/guide/python.md name what exists, and run one after another."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from univid_jax.cli.config_files import load_config
from univid_jax.config import presets
from univid_jax.config.boundary import from_config_dict
from univid_jax.core.errors import UserError
from univid_jax.data.media.writer import write_clip
from univid_jax.data.sources.computed import open_computed
from univid_jax.data.tasks import TASKS

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "python.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PRESET_FILE = "# mypreset.py\n"


def test_what_snippets_import_exists():
  imports = [node for text in SNIPPETS for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
  assert len(imports) > 20
  for node in imports:
    module = importlib.import_module(node.module or "")
    assert [each.name for each in node.names if not hasattr(module, each.name)] == []


def test_a_task_in_a_file_is_known_to_commands(tmp_path):
  (text,) = [text for text in SNIPPETS if text.startswith(PRESET_FILE)]
  (path := tmp_path / "mypreset.py").write_text(text)
  try:
    config = from_config_dict(load_config(str(path)))
    assert config.name == "brighten" and config.data.tasks["brighten"] == 1.0
    source = open_computed(config, "train", seed=0)
    sentence = next(sentence for sentence in map(source.__getitem__, range(100)) if sentence.task == "brighten")
    assert sentence.clips[1].mean() > sentence.clips[0].mean()
  finally:
    del TASKS["brighten"]
  with pytest.raises(UserError, match="unknown task 'brighten'"):
    open_computed(config, "train", seed=0)


@pytest.mark.long
def test_snippets_run(tiny_config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(presets, "tiny", lambda: tiny_config)
  for name in ("A", "A2", "B"):
    write_clip(f"{name}.png", np.zeros((1, 16, 16, 3), np.uint8))
  names: dict = {"__name__": "snippets"}
  for text in SNIPPETS:
    if not text.startswith(PRESET_FILE):
      exec(text.replace('"num_steps": 100', '"num_steps": 2').replace('"num_steps": 150', '"num_steps": 3'), names)
  assert names["row"].tokens.shape[0] == tiny_config.rows.per_batch
  assert names["velocity"].shape == names["latents"].shape
  assert names["residual"].shape[-1] == tiny_config.model.dim
  assert list(names["report"]["by_task"]) == ["negative"]
