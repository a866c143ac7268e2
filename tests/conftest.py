"""Settings made before JAX starts: eight CPU devices, full precision, and quick compilation, shared programs."""

import functools
import gc
import os
import shutil
import tempfile

from tests.commands import xla_flags

# Workers of pytest-xdist inherit these variables, and with them each other's compiled programs. A given folder of
# programs is used and kept, so that several runs can share one.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
PROGRAMS = None
if not IS_WORKER:
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS = tempfile.mkdtemp(prefix="univid_jax_programs")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # storing the many quick ones takes longer
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

import pytest  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
  """Returns one worker more than there are cores: each waits for commands and disks for a fifth of its time."""
  if wanted := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
    return int(wanted)
  return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


def pytest_configure(config):
  """Prepares a process that runs tests; the one that hands them out to workers goes without JAX, and starts sooner."""
  if IS_WORKER or config.getoption("dist", "no") == "no":
    prepare()


def pytest_collection_finish():
  gc.collect()
  gc.freeze()  # what has been imported stays


def prepare():
  """Checks shapes in the package while tests run, and makes JAX exact and quick."""
  import jax
  import jaxtyping
  import orbax.checkpoint as ocp

  from tests.typecheck import modules_with_shapes

  # Before anything is imported from the package.
  jaxtyping.install_import_hook(modules_with_shapes(), "tests.typecheck.check_types")
  jax.config.update("jax_default_matmul_precision", "highest")
  # By default each of the eight devices saves a slice of each array, and every slice is a program. So it is in the
  # commands that tests run in processes of their own.
  ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
  )
  gc.set_threshold(5000, 20, 50)  # looking for garbage among all that JAX keeps is a tenth of the time by default


def pytest_unconfigure():
  gc.collect()
  gc.freeze()  # pytest looks for garbage five times more
  if PROGRAMS:
    shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
  """Has all models, pipelines and autoencoders of a module trace the programs of equal ones once."""
  import univid_jax.checkpoints.pretrained
  import univid_jax.codecs.encoders
  import univid_jax.codecs.wan_vae
  import univid_jax.convert.layout
  import univid_jax.inference.pipeline

  with pytest.MonkeyPatch.context() as patch:
    for place, name in (
      (univid_jax.inference.pipeline, "Sampler"),
      (univid_jax.inference.pipeline, "JointSampler"),
      (univid_jax.codecs.wan_vae, "jit_method"),
      (univid_jax.codecs.encoders, "jit_method"),
      (univid_jax.checkpoints.pretrained, "abstract_component"),
      (univid_jax.convert.layout, "abstract_component"),
    ):
      patch.setattr(place, name, functools.cache(getattr(place, name)))
    yield


@pytest.fixture(scope="session")
def sklearn_metrics():
  """The module, which takes a second to import: of all workers only those that need it do."""
  from sklearn import metrics

  return metrics


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
  """The transformer of the miniature release, converted; some modules have a checkpoint of their own."""
  from tests.helpers import GOLDENS
  from univid_jax.convert.commands import convert_any

  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(GOLDENS / "tiny_wan" / "diffusion_pytorch_model.safetensors"), str(folder))
  return str(folder)


@pytest.fixture(scope="session")
def tiny_config():
  """The default config and a task that makes videos of images, so small that a step takes milliseconds."""
  from univid_jax.config.boundary import override
  from univid_jax.config.presets import tiny

  return override(
    tiny(),
    {
      "num_steps": 4,
      "optimizer.name": "adamw",  # compiles sooner than Muon
      "optimizer.learning_rate": 1e-3,
      "log_every": 1,
      "model.dim": 32,
      "model.ffn_dim": 64,
      "model.num_layers": 2,
      "model.freq_dim": 16,
      "model.text_dim": 8,
      "data.tasks.camera_movement": 0.5,
      "data.height": 16,
      "data.width": 16,
      "rows.num_tokens": 48,
      "rows.packing_bins": 8,
      "eval.sentences_per_case": 1,
      "eval.num_inference_steps": 2,
    },
  )
