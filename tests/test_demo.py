"""The demo in a real browser: python -m pytest -m slow tests/test_demo.py

Needs the extra `demo`, Playwright for Python, and a Chromium on the path.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.commands import environment
from tests.helpers import GOLDENS
from univid_jax.data.writer import write_clip

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serve(folder, *arguments):
  """Starts the demo with the miniature; yields its address and its log."""
  pytest.importorskip("gradio")
  from univid_jax.convert.commands import convert_any

  convert_any(str(GOLDENS / "tiny_wan"), str(folder / "wan"))
  command = [
    sys.executable,
    "-m",
    "univid_jax.demo",
    f"--checkpoint={folder / 'wan'}",
    "--dtype=float32",
    "--port=7871",
  ]
  path = folder / "log"
  with path.open("w") as log:
    environment_ = {**environment(), "GRADIO_ANALYTICS_ENABLED": "0"}
    server = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment_, cwd=folder)
    try:
      for _ in range(240):
        try:
          urllib.request.urlopen("http://127.0.0.1:7871", timeout=2)
          break
        except OSError:
          assert server.poll() is None, path.read_text()
          time.sleep(0.5)
      yield "http://127.0.0.1:7871", path
    finally:
      server.terminate()
      server.wait()


def status_of(url, data=None, **headers):
  try:
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20).status
  except urllib.error.HTTPError as error:
    return error.code


def test_only_uploads_and_samples_are_served_within_limits(tmp_path):
  """Neither files of the machine, nor of the folder it was started in; large files are refused."""
  (tmp_path / "secret.txt").write_text("secret")
  with serve(tmp_path, "--max_upload_mb=1") as (address, _):
    for path in ("/etc/hostname", tmp_path / "secret.txt", tmp_path / "wan" / "checkpoint.json"):
      assert status_of(f"{address}/gradio_api/file={path}") in (403, 404)
    for size, expected in ((1000, 200), (3_000_000, 413)):
      body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(size)
        + b"\r\n--x--\r\n"
      )
      headers = {"Content-Type": "multipart/form-data; boundary=x"}
      assert status_of(f"{address}/gradio_api/upload", body, **headers) == expected
    assert not any(":7871" in line and "127.0.0.1" not in line for line in listening_sockets())


def listening_sockets():
  """Returns local addresses that accept connections, from /proc."""
  lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
  found = []
  for line in lines:
    _, local, _, state, *_ = line.split()
    if state == "0A":
      address, port = local.split(":")
      octets = [str(int(address[i : i + 2], 16)) for i in (6, 4, 2, 0)]
      found.append(f"{'.'.join(octets)}:{int(port, 16)}")
  return found


def test_files_in_and_a_picture_out(tmp_path):
  playwright = pytest.importorskip("playwright.sync_api")
  chromium = shutil.which("chromium") or pytest.skip("no Chromium")
  clips = []
  for name, shade in (("a", 40), ("b", 120), ("c", 200)):
    write_clip(tmp_path / f"{name}.png", np.full((1, 60, 80, 3), shade, np.uint8))
    clips.append(str(tmp_path / f"{name}.png"))
  with serve(tmp_path) as (address, log), playwright.sync_playwright() as p:
    browser = p.chromium.launch(
      executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    )
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("text=Visual sentences", timeout=60_000)
    for path in clips:
      page.locator("input[type=file]").nth(0).set_input_files(path)
      page.wait_for_selector(f"text={os.path.basename(path).split('.')[0]}", timeout=20_000)
    page.get_by_label(re.compile("^number input for Steps|^Steps")).first.fill("2")
    page.get_by_role("button", name="Sample B'").click()
    page.wait_for_selector("img[src*='sample_0']", timeout=120_000)
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    browser.close()
    print(log.read_text()[-3000:])
