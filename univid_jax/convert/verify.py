"""Verification of a conversion: compares tensors bit by bit, and the outputs of the models."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from univid_jax.checkpoints.checksums import combine_digests, tensor_digest
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.convert.export import original_tensors
from univid_jax.convert.identify import Source
from univid_jax.convert.outputs import OUTPUTS
from univid_jax.convert.sources import Release
from univid_jax.core.installation import install_command
from univid_jax.core.text import is_or_are
from univid_jax.parallel.mesh import make_mesh

# Relative L2 error between the outputs here and in PyTorch, both in float32.
TOLERANCE = 1e-4


def verify_release(release: Release, destination: epath.PathLike) -> tuple[str, bool]:
  """Compares a checkpoint folder with the release that it was converted from, and that `plan_components` has checked.

  Returns:
    A report with a verdict in its last line, and whether everything is equal.

  Raises:
    UserError: the folder is incomplete or damaged.
  """
  checkpoint = PretrainedCheckpoint.open(destination)
  results = [compare_tensors(source, checkpoint) for source in release.sources]
  results += [
    compare_outputs(source, checkpoint)
    for source in release.sources
    if source.component in OUTPUTS and checkpoint.has(source.component)
  ]
  failures = sum(not equal for _, equal in results)
  equal = f"{destination} equals its source, {release.variant}, {_describe_checks()}"
  verdict = f"{failures} checks FAILED" if failures else equal
  return "\n".join([*(line for line, _ in results), f"verdict: {verdict}"]), not failures


def compare_tensors(source: Source, checkpoint: PretrainedCheckpoint) -> tuple[str, bool]:
  """Compares tensors by their digests, after rounding to the dtype of the checkpoint."""
  component = source.component
  if not checkpoint.has(component):
    return f"{component}: FAILED, {checkpoint.folder} does not contain it", False
  different, digests, largest = [], {}, 0.0
  tensors = original_tensors(checkpoint, component)
  for name in tensors.infos:
    if name not in source.tensors.infos:
      continue  # it was allowed to be missing
    stored = tensors.read(name)
    original = source.tensors.read(name).astype(stored.dtype).reshape(stored.shape)
    digests[name] = tensor_digest(name, stored)
    if digests[name] != tensor_digest(name, original):
      different.append(name)
      largest = max(largest, float(np.max(np.abs(stored.astype(np.float64) - original.astype(np.float64)))))
  if different:
    return (
      f"{component}: FAILED, {len(different)} of {len(digests)} tensors differ by up to {largest:.2g}, the first is "
      f"{different[0]} ({_describe_values(source.tensors.read(different[0]))} in the source)"
    ), False
  checksum = combine_digests(digests)
  if checksum != checkpoint.checksum(component):
    return f"{component}: FAILED, checkpoint.json has another checksum than its {len(digests)} tensors", False
  return f"{component}: {len(digests)} tensors equal bit for bit, checksum {checksum[:16]}...", True


def compare_outputs(source: Source, checkpoint: PretrainedCheckpoint) -> tuple[str, bool]:
  """Compares a component's output on fixed inputs with that of PyTorch, if PyTorch and diffusers are installed."""
  outputs = OUTPUTS[source.component]
  graph, params = checkpoint.load(source.component, mesh=make_mesh({"data": -1}, jax.devices()[:1]), dtype=jnp.float32)
  with jax.default_matmul_precision("highest"):
    ours = outputs.ours(nnx.merge(graph, params), source.config)
  line = f"{source.component}: output {_describe_values(ours)}"
  if not np.isfinite(ours).all():
    return f"{line}: FAILED, not finite", False
  if _absent():
    return f"{line}; not compared with PyTorch", True
  expected = outputs.theirs(source)
  error = float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
  equal = error <= TOLERANCE
  return f"{line}; error against PyTorch {error:.1e}, {'at most' if equal else 'FAILED, above'} {TOLERANCE:.0e}", equal


def _absent() -> list[str]:
  """Returns the packages that comparing outputs needs and that are not installed."""
  return [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]


def _describe_checks() -> str:
  """Says which comparisons a verdict rests on, and how to have the others."""
  if not (absent := _absent()):
    return "bit for bit, and its outputs equal PyTorch's"
  missing = f"{' and '.join(absent)} {is_or_are(len(absent))} not installed"
  return f"bit for bit; its outputs were not compared with PyTorch's, as {missing}: {install_command('parity')}"


def _describe_values(tensor: np.ndarray) -> str:
  x = tensor.astype(np.float64)
  return f"mean {x.mean():.4g}, std {x.std():.4g}, from {x.min():.4g} to {x.max():.4g}"
