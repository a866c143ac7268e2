"""Set before JAX starts: a CPU that looks like eight devices, full precision for comparisons, programs made quickly and kept."""

import os
import shutil
import tempfile

# The processes that pytest-xdist starts inherit all this, and with it the programs of one another.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="univid_jax_programs")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.03"
  os.environ["JAX_PLATFORMS"] = "cpu"
  # Most tests compile for far longer than they compute: LLVM's optimizations would take a third of their compilation.
  flags = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
  os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_unconfigure():
  if not IS_WORKER:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
