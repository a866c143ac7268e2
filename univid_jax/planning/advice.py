"""Finds out how to train a config on a kind of chip: the base's storage, what is recomputed, the mesh, the rows.

`advise` orders combinations by estimated speed (`planning.estimates`), drops those that certainly do not fit, and lets
the compiler decide on the others until a few fit. For a GPU that is not present the estimate decides, with margins. It
looks at smaller rows and clips only if nothing else fits.
"""

import dataclasses
import functools
import itertools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from univid_jax.checkpoints.run_parts import codec_shape, with_stored_base
from univid_jax.checkpoints.sentence_lengths import check_rows, clip_tokens, longest_sentence
from univid_jax.config.boundary import override
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.numbers import round_up
from univid_jax.core.options import Quantize, RematPolicy
from univid_jax.core.text import count_noun
from univid_jax.models.attention import splash
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning.estimates import GPU_MARGIN, HOST_BANDWIDTH, Estimate, estimate
from univid_jax.planning.forecasts import forecast
from univid_jax.platform.chips import CHIPS, GPU_SHARE, NAMES, Chip, find_chip, is_tpu
from univid_jax.platform.topologies import describe_devices, find_topology, use_tpu_compiler
from univid_jax.training.memory import DoesNotFitError, Forecast

Changes = Mapping[str, Any]

GPU_ENVIRONMENT = f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"
# Share of the memory; an option that leaves less is tight, since compilers' figures change with their version.
SPARE = 0.1
GPU_BLOCK = 128  # tokens of a tile of cuDNN's attention
# Measured over estimated seconds of a step, where it was measured (docs/benchmarks/gpu.md).
MEASURED = {"h100": 1.7}
LEFT_OUT = 6  # maximum lines about options that do not fit
# Relative speed-up that a less precisely stored base needs to come first.
SPEEDUP = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """Chips to train on.

  Attributes:
    name: name of the chip, in `chips.NAMES`.
    count: number of chips.
  """

  name: str
  count: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[NAMES[self.name]]

  @property
  def is_tpu(self) -> bool:
    return is_tpu(self.name)

  @property
  def memory(self) -> float:
    """Bytes of each chip's memory that JAX may use."""
    return self.chip.memory * (1 if self.is_tpu else GPU_SHARE)

  @property
  def block(self) -> int:
    """Tokens that attention computes together; rows are multiples of it."""
    return splash.BLOCK_KV if self.is_tpu else GPU_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """A combination of settings, as `advise` considers it.

  Attributes:
    changes: changes to the config.
    config: the config with these changes.
    mesh: sizes of data, fsdp and context.
    estimate: estimate of a step.
    memory: bytes on each device, from the compiler or the estimate.
    problem: why it does not fit; "" if it does.
  """

  changes: Changes
  config: RunConfig
  mesh: Mapping[str, int]
  estimate: Estimate
  memory: float = 0.0
  problem: str = ""

  @property
  def sentences_per_s(self) -> float:
    """Estimated speed, for sentences of context I."""
    return self.estimate.rows * self.config.rows.num_tokens / (4 * clip_tokens(self.config)) / self.estimate.seconds

  def __str__(self) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
    tokens, frames = self.config.rows.num_tokens, count_noun(self.config.data.num_frames, "frame")
    stored = "not quantised" if self.config.base.quantize == Quantize.NONE else f"in {self.config.base.quantize}"
    base = f"{stored}{', offloaded' if self.config.base.offload else ''}"
    parts = base, self.config.model.remat, mesh, tokens, frames
    return "base {}, remat {}, mesh {}, rows of {} tokens, clips of {}".format(*parts)

  def command(self, arguments: Sequence[str] = (), *, environment: str = "") -> str:
    """Returns the command that trains this option, given the command-line arguments that describe the config."""
    kept = [word for word in arguments if word.partition("=")[0].removeprefix("--config.") not in self.changes]
    changes = [f"--config.{key}={value}" for key, value in self.changes.items()]
    return " ".join(filter(None, [environment, "univid-train", shlex.join([*kept, *changes])]))


def advise(
  config: RunConfig,
  machine: Machine,
  compile_config: Callable[[RunConfig], Forecast] | None,
  *,
  count: int = 3,
  progress: Callable[[str], None] = lambda _: None,
) -> list[Option]:
  """Returns the options that were examined, by estimated speed, until `count` fit.

  Of about equally fast bases, the most precisely stored one comes first; others are examined only where it leaves less
  than a tenth of the memory.

  Args:
    config: of the run.
    machine: the chips.
    compile_config: forecasts a config with the chip's compiler; None trusts the estimate, with its margin.
    count: number of options that fit.
    progress: called with a description of what is compiled.

  Raises:
    UserError: the config is not valid for any option, or nothing fits.
  """
  check_rows(config)
  config = with_stored_base(config)
  tried: list[Option] = []
  for level in smaller_rows(config, machine):
    fitting: list[Option] = []
    for option in order(make_options(config, machine, level)):
      if any(_replaces(other, option) and other.memory < (1 - SPARE) * machine.memory for other in fitting):
        continue
      option = _check(option, machine, compile_config, progress)
      tried.append(option)
      fitting += [] if option.problem else [option]
      if len(fitting) == count:
        break
    if fitting:
      return tried
  if not tried:
    raise UserError(f"no mesh of {machine.count} {machine.name} divides the rows of this config: see config.rows")
  best = min(tried, key=lambda option: option.estimate.total)
  raise UserError(f"nothing fits {machine.count} {machine.name}: the smallest, {best}, {best.problem}; take more chips")


def order(options: Iterable[Option]) -> list[Option]:
  """Sorts options, fastest first; an option precedes those that differ only in a less precise base and gain little."""
  options = list(options)

  def place(option: Option) -> tuple[float, int]:
    limit = (1 + SPEEDUP) * option.sentences_per_s
    replaced = [other.sentences_per_s for other in options if _replaces(option, other)]
    return -max([option.sentences_per_s, *(speed for speed in replaced if speed <= limit)]), _imprecision(option)

  return sorted(options, key=place)


def _replaces(option: Option, other: Option) -> bool:
  """Returns whether two options differ only in how the base is stored, more precisely in the first."""
  return (option.mesh, option.config.model.remat) == (other.mesh, other.config.model.remat) and _imprecision(
    option
  ) < _imprecision(other)


def _imprecision(option: Option) -> int:
  return list(Quantize).index(option.config.base.quantize)


def _check(
  option: Option,
  machine: Machine,
  compile_config: Callable[[RunConfig], Forecast] | None,
  progress: Callable[[str], None],
) -> Option:
  """Returns an option with its memory, and the problem if it does not fit."""
  capacity = machine.memory
  total = option.estimate.total if compile_config is None else option.estimate.least
  if total > capacity:
    at_least = "" if compile_config is None else "at least "
    return dataclasses.replace(option, memory=total, problem=f"needs {at_least}{_gigabytes(total, capacity)}")
  if compile_config is None:
    return dataclasses.replace(option, memory=total)
  progress(f"compiling: {option}")
  try:
    found = compile_config(option.config)
  except UserError as error:
    text = first_line(error)[:120]
    if isinstance(error, DoesNotFitError) and error.temporaries:
      text = f"needs {error.temporaries / 1e9:.1f} GB besides its inputs"
    return dataclasses.replace(option, problem=text)
  capacity = found.memory or capacity
  problem = "" if found.total <= capacity else f"needs {_gigabytes(found.total, capacity)}"
  return dataclasses.replace(option, memory=found.total, problem=problem)


def _gigabytes(total: float, capacity: float) -> str:
  return f"{total / 1e9:.1f} of {capacity / 1e9:.1f} GB"


def make_options(config: RunConfig, machine: Machine, level: Changes) -> Iterator[Option]:
  """Yields the combinations for rows of one size that the program accepts."""
  dtype: Changes = {}
  if config.model.dtype == "bfloat16" and machine.chip.dtype != "bfloat16":
    dtype = {"model.dtype": machine.chip.dtype, "model.param_dtype": machine.chip.dtype}
  policies = [policy for policy in RematPolicy if policy != RematPolicy.OFFLOAD or machine.is_tpu]  # not tried on GPUs
  for method, remat, (data, fsdp, context) in itertools.product(_storages(config), policies, _meshes(machine.count)):
    mesh = {"data": data, "fsdp": fsdp, "context": context}
    changes: dict[str, Any] = {**dtype, **level, "base.quantize": str(method), "model.remat": str(remat)}
    if remat == RematPolicy.OFFLOAD and config.lora.enabled:
      changes["base.offload"] = True
    changes |= {f"mesh.{axis}": size for axis, size in mesh.items()} | {"mesh.tensor": 1}
    try:
      changed = override(config, changes)
      check_rows(changed)
      if changed.rows.num_tokens % context:
        continue
      expected = estimate(changed, machine.chip, mesh, is_tpu=machine.is_tpu)
    except UserError:  # rows that do not divide, a base that cannot be quantised
      continue
    if changed.rows.streams and expected.rows % changed.rows.streams:
      continue
    changes = {key: value for key, value in changes.items() if _value(changed, key) != _value(config, key)}
    yield Option(changes=changes, config=changed, mesh=mesh, estimate=expected)


def _value(config: RunConfig, key: str) -> object:
  return functools.reduce(getattr, key.split("."), config)


def _storages(config: RunConfig) -> Sequence[Quantize]:
  """Returns how the base may be stored; fp8 is left out, since it takes as much as int8 and is less precise."""
  if config.base.quantize != Quantize.NONE or not config.lora.enabled:
    return (config.base.quantize,)
  return (Quantize.NONE, Quantize.INT8, Quantize.NF4)


def fsdp_sizes(count: int) -> list[int]:
  """Returns sizes of fsdp, least traffic first: whole weights on every device, sharded over eight, or over all.

  Args:
    count: number of devices that do not share rows.
  """
  return [size for size in sorted({1, 8, count}) if count % size == 0]


def _meshes(count: int) -> Iterator[tuple[int, int, int]]:
  """Yields sizes of data, fsdp and context."""
  for context in (size for size in range(1, count + 1) if count % size == 0):
    rest = count // context
    for fsdp in fsdp_sizes(rest):
      yield rest // fsdp, fsdp, context


def smaller_rows(config: RunConfig, machine: Machine) -> Iterator[Changes]:
  """Yields changes that make rows ever smaller, from no change to a sentence of images."""
  yield {}
  stride = codec_shape(config).temporal_stride
  levels: dict[int, Changes] = {}
  sizes = sorted(set(config.data.sizes), key=math.prod, reverse=True)
  for (height, width), frames in itertools.product(sizes, range(config.data.num_frames, 0, -stride)):
    changes = {}
    if frames != config.data.num_frames:
      changes["data.num_frames"] = frames
    if (height, width) != sizes[0]:
      changes |= {"data.height": height, "data.width": width, "data.buckets": ()}
    tokens, _, _ = longest_sentence(override(config, changes))
    levels.setdefault(round_up(tokens, machine.block), changes)
  for tokens, changes in sorted(levels.items(), reverse=True):
    if tokens < config.rows.num_tokens:
      yield {**changes, "rows.num_tokens": tokens}


def describe(options: Sequence[Option], machine: Machine, arguments: Sequence[str], *, is_compiled: bool) -> str:
  """Describes the options that fit, each with its command, and why others are left out, those that nearly fit first."""
  lines = []
  for number, option in enumerate([option for option in options if not option.problem], 1):
    expected = option.estimate
    lines += [
      f"{number}. {option}: {_gigabytes(option.memory, machine.memory)}; step of "
      f"{count_noun(expected.rows, 'row')} in about "
      f"{expected.seconds:.1f} s (compute {expected.compute:.1f}, memory {expected.memory:.1f}, network "
      f"{expected.network:.1f})",
      f"   {option.command(arguments, environment='' if machine.is_tpu else GPU_ENVIRONMENT)}",
    ]
  left_out = sorted((option for option in options if option.problem), key=lambda option: option.estimate.total)
  if left_out:
    lines.append("left out, faster or with larger rows:")
  lines += [f"   {option}: {option.problem}" for option in left_out[:LEFT_OUT]]
  if len(left_out) > LEFT_OUT:
    lines.append(f"   and {len(left_out) - LEFT_OUT} that need more")
  origin = f"the compiler's for {machine.name}"
  if not is_compiled:
    origin = (
      f"estimated, activations with {GPU_MARGIN:.0%} on top; run where the {machine.name} is, this asks its compiler"
    )
  seconds = "seconds are estimated from the chip's peaks, as if nothing overlapped"
  if any(option.config.base.offload for option in options if not option.problem):
    seconds += f" but the host's copies, assumed to take {HOST_BANDWIDTH / 1e9:.0f} GB/s"
  if machine.name in MEASURED:
    seconds += f"; a step that was measured took {MEASURED[machine.name]} times as long"
  return "\n".join([*lines, f"memory is {origin}; {seconds}"])


def find_compiler(machine: Machine) -> Callable[[RunConfig], Forecast] | None:
  """Returns a function that forecasts a config with a machine's compiler; None for GPUs that are not present.

  Raises:
    UserError: the chips are TPUs, and libtpu is not installed or no slice has this number of chips.
  """
  if machine.is_tpu:
    topology = find_topology(machine.name, machine.count)
    use_tpu_compiler()
    devices = describe_devices(topology)
  else:
    devices = [device for device in jax.devices() if device.platform == "gpu" and find_chip(device) == machine.chip]
    if len(devices) < machine.count:
      return None

  def compile_config(config: RunConfig) -> Forecast:
    try:
      return forecast(config, make_mesh(config.mesh, devices[: machine.count]))
    finally:
      jax.clear_caches()  # programs are large

  return compile_config
