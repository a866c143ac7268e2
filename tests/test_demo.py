"""The demo in a real browser: python -m pytest -m slow tests/test_demo.py

Needs the extra `demo`, Playwright for Python, and a Chromium on the path.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from tests.commands import environment
from tests.helpers import GOLDENS
from univid_jax.data.writer import write_clip

pytestmark = pytest.mark.slow


def test_files_in_and_a_picture_out(tmp_path):
  pytest.importorskip("gradio")
  playwright = pytest.importorskip("playwright.sync_api")
  chromium = shutil.which("chromium") or pytest.skip("no Chromium")
  from univid_jax.convert.commands import convert_any

  convert_any(str(GOLDENS / "tiny_wan"), str(tmp_path / "wan"))
  clips = []
  for name, shade in (("a", 40), ("b", 120), ("c", 200)):
    write_clip(tmp_path / f"{name}.png", np.full((1, 60, 80, 3), shade, np.uint8))
    clips.append(str(tmp_path / f"{name}.png"))
  log = (tmp_path / "log").open("w")
  command = [
    sys.executable,
    "-m",
    "univid_jax.demo",
    f"--checkpoint={tmp_path / 'wan'}",
    "--dtype=float32",
    "--port=7871",
  ]
  server = subprocess.Popen(command, stdout=log, stderr=log, env={**environment(), "GRADIO_ANALYTICS_ENABLED": "0"})
  try:
    for _ in range(120):
      try:
        urllib.request.urlopen("http://127.0.0.1:7871", timeout=2)
        break
      except OSError:
        time.sleep(0.5)
    with playwright.sync_playwright() as p:
      browser = p.chromium.launch(
        executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
      )
      page = browser.new_page()
      page.goto("http://127.0.0.1:7871")
      page.wait_for_selector("text=Visual sentences", timeout=60_000)
      for index, path in enumerate(clips):
        page.locator("input[type=file]").nth(0).set_input_files(path)
        page.wait_for_selector(f"text={os.path.basename(path).split('.')[0]}", timeout=20_000)
        assert index < 3
      page.get_by_label(re.compile("^number input for Steps|^Steps")).first.fill("2")
      page.get_by_role("button", name="Sample B'").click()
      page.wait_for_selector("img[src*='sample_0']", timeout=120_000)
      page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
      browser.close()
  finally:
    server.terminate()
    print((tmp_path / "log").read_text()[-3000:])
