"""Set before JAX starts: a CPU that looks like eight devices, full precision for comparisons, programs made quickly and kept."""

import os
import shutil
import tempfile

from tests.commands import xla_flags

# The processes that pytest-xdist starts inherit all this, and with it the programs of one another. So do runs that are given
# one folder for their programs, as those of .ci/run are.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
PROGRAMS = None
if not IS_WORKER:
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS = tempfile.mkdtemp(prefix="univid_jax_programs")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.03"
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_unconfigure():
  if PROGRAMS:
    shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture
def tiny_config():
  """The default config, cut down until a step takes milliseconds."""
  from configs.video_tasks import get_config

  config = get_config()
  config.update({"num_steps": 4, "log_every": 1})
  config.model.update({"dim": 32, "ffn_dim": 64, "num_layers": 2, "freq_dim": 16, "text_dim": 8})
  config.data.update({"height": 16, "width": 16})
  config.rows.update({"num_tokens": 48, "packing_bins": 8})
  config.eval.update({"sentences_per_case": 1, "num_inference_steps": 2})
  return config
