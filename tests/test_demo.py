"""The demo in a real browser: python -m pytest -m slow tests/test_demo.py

Needs the extra `demo`, Playwright for Python, and a Chromium on the path.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.commands import environment
from tests.helpers import GOLDENS
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import Difference
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.data.media.writer import write_clip

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serve(folder, *arguments, checkpoint=None):
  """Starts the demo with a checkpoint, or the miniature; yields its address and its log."""
  pytest.importorskip("gradio")
  from univid_jax.convert.commands import convert_any

  if checkpoint is None:
    convert_any(str(GOLDENS / "tiny_wan"), str(folder / "wan"))
  command = [
    sys.executable,
    "-m",
    "univid_jax.demo",
    f"--checkpoint={checkpoint or folder / 'wan'}",
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


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api")
  chromium = shutil.which("chromium") or pytest.skip("no Chromium")
  arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  with playwright.sync_playwright() as p:
    yield p.chromium.launch(executable_path=chromium, args=arguments)


def open_page(browser, address, width=1280):
  """Opens the page; errors in its console are collected in `page.errors`."""
  page = browser.new_page(viewport={"width": width, "height": 900})
  page.errors = []
  page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
  page.goto(address)
  page.wait_for_selector("text=Visual sentences", timeout=60_000)
  return page


def set_steps(page, count):
  page.get_by_text("Prompt, steps and seed").click()
  steps = page.get_by_label("number input for Steps")
  steps.fill(str(count))
  steps.press("Tab")


def sample(page):
  page.get_by_role("button", name="Sample B'").click()
  page.wait_for_selector("text=sampled in", timeout=300_000)


def test_an_example_becomes_a_result(tmp_path, browser):
  """Without any file of one's own: previews while it is sampled, three views, and a download with the command."""
  with serve(tmp_path) as (address, log):
    page = open_page(browser, address)
    page.locator(".examples button").first.click()
    page.wait_for_function("document.querySelectorAll('.clip img').length == 3")
    set_steps(page, 6)
    page.get_by_role("button", name="Sample B'").click()
    page.wait_for_selector("text=/Step [1-5] of 6/", timeout=300_000)
    page.wait_for_selector(".result img")
    estimate = page.locator(".result img").first.get_attribute("src")
    page.wait_for_selector("text=sampled in", timeout=300_000)
    assert page.locator(".result img").first.get_attribute("src") != estimate
    for name in ("Side by side", "Difference"):
      page.get_by_role("tab", name=name).click()
      shown = page.locator(".result img:visible")
      page.wait_for_function("image => image.naturalWidth >= 512", arg=shown.element_handle())
    assert "--steps=6 --seed=0" in page.locator(".command").inner_text()
    with page.expect_download() as download:
      page.get_by_role("button", name="Download with clips").click()
    with zipfile.ZipFile(download.value.path()) as bundle:
      assert {"A.png", "A2.png", "B.png", "B2.png", "B2.json", "sample.sh"} <= set(bundle.namelist())
    assert not page.errors, page.errors
    assert "Traceback" not in log.read_text()


def test_own_clips_and_models_on_a_phone(tmp_path, browser):
  for name, count in (("a", 5), ("b", 5), ("c", 5)):
    write_clip(tmp_path / f"{name}.mp4", np.full((count, 60, 80, 3), 40 * ord(name) % 256, np.uint8), fps=8)
  bias = Difference(np.ones(json.loads((GOLDENS / "tiny_wan" / "config.json").read_text())["dim"], np.float32))
  write_lora(tmp_path / "style.safetensors", LoRAWeights({"blocks.0.ffn.2.bias": bias}, "jax"), "comfyui")
  with serve(tmp_path, f"--lora={tmp_path / 'style.safetensors'}") as (address, log):
    page = open_page(browser, address, width=390)
    for index, name in enumerate("abc"):
      page.locator("input[type=file]").first.set_input_files(str(tmp_path / f"{name}.mp4"))
      page.wait_for_function("n => document.querySelectorAll('.clip video').length == n", arg=index + 1)
    weight = page.get_by_label("number input for Weight of style.safetensors")
    weight.fill("0.5")
    weight.press("Tab")
    set_steps(page, 2)
    sample(page)
    assert "style.safetensors:0.5 --steps=2" in page.locator(".command").inner_text().replace("\n", "")
    assert page.locator(".result video:visible").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the screen"
    page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)
    assert not page.errors, page.errors
    assert "Traceback" not in log.read_text()
    (tmp_path / "c.mp4").write_bytes(b"no video")
    page.get_by_label("Clear").last.click()
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "c.mp4"))
    page.wait_for_selector("text=/cannot read c.mp4|c.mp4.*not a/", timeout=60_000)


def test_a_model_without_text_encoder_asks_for_no_prompt(tmp_path, browser):
  with serve(tmp_path, checkpoint="small") as (address, _):
    page = open_page(browser, address)
    page.get_by_text("Steps and seed", exact=True).click()
    assert page.get_by_label("number input for Steps").is_visible()
    for label in ("Task prompt", "or one of your own"):
      assert page.get_by_label(label).count() == 0
