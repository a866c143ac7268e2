"""The notebooks run from top to bottom, with few steps, and are stored without outputs."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import xla_flags

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three():
  assert [path.stem for path in NOTEBOOKS] == ["finetune_wan", "quickstart", "tasks_tour"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
  assert "colab-badge.svg" in notebook.cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_repository_is_named_once_at_the_top(path):
  code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
  assert 'REPOSITORY = "' in code[0]
  assert not any("REPOSITORY =" in source or "git clone -q http" in source for source in code[1:])


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  if path.stem == "finetune_wan":
    pytest.importorskip("torch", reason="reading .pth files needs the extra `convert`")
  for name in ("univid_jax", "configs", "tools", "setup.cfg"):
    (tmp_path / name).symlink_to(ROOT / name)
  shutil.copytree(ROOT / "tests" / "goldens" / "tiny_wan", tmp_path / "tests" / "goldens" / "tiny_wan")
  monkeypatch.setenv("NUM_STEPS", "3")
  monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
  notebook = nbformat.read(path, as_version=4)
  NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  printed = "\n".join(output.get("text", "") for output in outputs)
  assert "error:" not in printed, printed
  assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
