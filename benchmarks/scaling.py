"""Training on TPUs that are not present: memory, traffic and a roofline by the TPU compiler (`pip install '.[tpu]'`).

  python -m benchmarks.scaling [--presets=wan_1_3b,wan_14b] [--topologies=v5e:2x4,v5p:2x2x2,v6e:2x4] [--contexts=1,4]
      [--override=KEY=VALUE,...] [--all] [--out=FILE.jsonl]

For each preset, topology and number of devices that share a row, the step is compiled on the meshes that could hold the
weights, in the order of least traffic (weights on every chip, then sharded over eight, then over all), until one fits;
with --all, on all of them. Each takes two to five minutes; with --out, lines that the file already has are not compiled
again. Rows are those of the preset, one per data x fsdp device; with another `rows.num_tokens` in --override, a row is
filled with sentences of context I, then of images. Presets with two experts train the high-noise one, unless --override
says otherwise.

Memory is the compiler's figure; for a program that it refuses, only that of the temporaries. Times are lower bounds
from stated peaks (`platform.chips`): operations by formula, recomputation included; bytes that the program reads and
writes; bytes that its collectives carry. The largest of the three bounds the step. The file also has the cycles that
the compiler expects for everything but attention.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds import bound_seconds, num_layers
from benchmarks.figures import FigureFile
from benchmarks.programs import estimated_cycles
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.boundary import override
from univid_jax.config.presets import PRESETS
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import TrainedExpert
from univid_jax.platform.chips import CHIPS, NAMES, Chip
from univid_jax.platform.topologies import count_chips, describe_devices, use_tpu_compiler

FLAGS = CommandFlags(__doc__)
PRESET_NAMES = FLAGS.strings("presets", ["wan_1_3b", "wan_14b"], "Presets, see config.presets.")
TOPOLOGIES = FLAGS.strings("topologies", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"], "Names that libtpu knows.")
CONTEXTS = FLAGS.strings("contexts", ["1", "4"], "Sizes of the mesh's sequence axis (config.mesh.context) to try.")
OVERRIDE = FLAGS.strings("override", [], "Changes of the presets, KEY=VALUE, for example rows.num_tokens=131040.")
ALL = FLAGS.switch("all", False, "Compile all meshes, not only up to the first that fits.")
OUT = FLAGS.string("out", "", "File for the table, one line of JSON per program; an existing file is continued.")
ONE = FLAGS.string("one", "", "PRESET TOPOLOGY FSDP CONTEXT [OVERRIDE]: compiles one line; used internally.")

COLUMNS = (
  "preset",
  "topology",
  "data x fsdp x context",
  "GB per chip",
  "compute",
  "memory",
  "network",
  "bottleneck",
  "rows/s at most",
  "collectives (GB per chip)",
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A program to compile: a preset on a mesh; `context` is the size of the sequence axis, `override` KEY=VALUE,..."""

  preset: str
  topology: str
  fsdp: int
  context: int
  override: str = ""

  @property
  def config(self) -> RunConfig:
    changes = {"mesh.data": -1, "mesh.fsdp": self.fsdp, "mesh.context": self.context}
    return override(make_config(self.preset, self.override), changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A line of the table; it has no forecast if the compiler refused the program.

  Attributes:
    data: size of the data axis.
    memory_gb: memory per chip, or of the temporaries if the compiler refused the program; None if unknown.
    of_gb: memory that a chip has; 0 if the compiler refused the program.
    seconds: lower bounds of a step: compute, memory, network.
    rows_per_s: upper bound of the rate.
    collective_gb: traffic per chip, by kind of collective.
    estimated_cycles: cycles that the compiler expects.
  """

  preset: str
  topology: str
  data: int
  fsdp: int
  context: int
  fits: bool
  memory_gb: float | None
  override: str = ""
  of_gb: float = 0.0
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  bottleneck: str = ""
  rows_per_s: float = 0.0
  collective_gb: Mapping[str, float] = dataclasses.field(default_factory=dict)
  estimated_cycles: float = 0.0

  @property
  def setup(self) -> Setup:
    return Setup(self.preset, self.topology, self.fsdp, self.context, self.override)

  def to_markdown(self) -> str:
    size = "?" if self.memory_gb is None else f"{self.memory_gb:.1f}"
    expert = make_config(self.preset, self.override).model.expert
    name = self.preset if expert == TrainedExpert.ONLY else f"{self.preset}, expert {expert}"
    cells = [name, self.topology, f"{self.data} x {self.fsdp} x {self.context}"]
    if self.fits:
      collectives = ", ".join(f"{kind} {gb:.1f}" for kind, gb in self.collective_gb.items() if gb >= 0.05)
      cells += [
        f"{size} of {self.of_gb:.1f}",
        *(f"{self.seconds[name]:.2f} s" for name in ("compute", "memory", "network")),
        self.bottleneck,
        f"{self.rows_per_s:.2f}",
        collectives or "under 0.05",
      ]
    else:
      cells += [f"{size}{'' if self.of_gb else ' besides inputs'}: does not fit", *[""] * 6]
    return f"| {' | '.join(cells)} |"


class Table:
  """Lines by setup; compiles those that its file lacks and appends them.

  Args:
    path: path of the file; empty for none.
  """

  def __init__(self, path: str | Path):
    self._file = FigureFile(path)
    self._lines = {line.setup: line for line in (Line(**figures) for figures in self._file.lines)}

  def line(self, setup: Setup) -> Line:
    if setup not in self._lines:
      line = self._lines[setup] = compile_apart(setup)
      self._file.add(dataclasses.asdict(line))
    return self._lines[setup]


def compile_setup(setup: Setup) -> Line:
  """Compiles a line of the table in this process, for TPUs that need not be present."""
  use_tpu_compiler()
  from univid_jax.parallel.mesh import make_mesh, row_shards
  from univid_jax.planning.forecasts import compile_training
  from univid_jax.training.memory import DoesNotFitError

  config = setup.config
  mesh = make_mesh(config.mesh, describe_devices(setup.topology))
  head: dict[str, Any] = {**dataclasses.asdict(setup), "data": mesh.shape["data"]}
  try:
    program, memory = compile_training(config, mesh)
  except DoesNotFitError as error:
    return Line(**head, fits=False, memory_gb=error.temporaries and error.temporaries / 1e9)
  rows = config.rows.batch_size(row_shards(mesh))
  text = program.as_text()
  seconds, collectives = bound_seconds(config, text, rows=rows, num_chips=mesh.size, chip=chip_of(setup.topology))
  return Line(
    **head,
    fits=memory.fits,
    memory_gb=memory.total / 1e9,
    of_gb=(memory.memory or 0) / 1e9,
    seconds=seconds,
    bottleneck=max(seconds, key=lambda name: seconds[name]),
    rows_per_s=rows / max(seconds.values()),
    collective_gb={kind: size / 1e9 for kind, size in collectives.items() if size},
    estimated_cycles=estimated_cycles(text, num_layers(config)),
  )


def parse_overrides(text: str) -> dict[str, Any]:
  """Parses KEY=VALUE,...; values are numbers, true, false, or text.

  Raises:
    UserError: a part has no =.
  """
  changes = {}
  for part in filter(None, text.split(",")):
    key, separator, value = part.partition("=")
    if not separator:
      raise UserError(f"--override takes KEY=VALUE,..., got {part!r}")
    try:
      changes[key] = json.loads(value)
    except ValueError:
      changes[key] = value
  return changes


def compile_apart(setup: Setup) -> Line:
  """Compiles a line of the table in a separate process, so that its memory is freed afterwards.

  Raises:
    UserError: it fails; the message has the last line of its output.
  """
  values = " ".join(map(str, dataclasses.astuple(setup)))
  command = [sys.executable, "-m", "benchmarks.scaling", f"--one={values}"]
  done = subprocess.run(command, capture_output=True, text=True)
  if result := re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE):
    return Line(**json.loads(result[1]))
  raise UserError(f"{setup.preset} on {setup.topology}: {(done.stderr.strip() or 'it was killed').splitlines()[-1]}")


def make_config(preset: str, overrides: str) -> RunConfig:
  """Returns a preset with overrides, KEY=VALUE,...; of two experts one is trained unless they say otherwise."""
  config, changes = PRESETS[preset](), parse_overrides(overrides)
  if config.model.expert == TrainedExpert.BOTH:  # one at a time; the other would add only its weights
    changes = {"model.expert": "high", **changes}
  return override(config, changes)


def weight_bytes(preset: str, overrides: str) -> float:
  """Returns the bytes of the frozen base of a preset with overrides that are on the devices."""
  from univid_jax.planning.estimates import model_bytes

  config = make_config(preset, overrides)
  sizes = model_bytes(config)
  return len(config.model.expert.parts) * (sizes.base - config.base.offload * sizes.blocks)


def chip_of(topology: str) -> Chip:
  return CHIPS[NAMES[topology.partition(":")[0]]]


def table_lines(
  table: Table,
  preset: str,
  topology: str,
  *,
  weights: float,
  contexts: Sequence[int],
  all_meshes: bool = False,
  overrides: str = "",
) -> Iterator[Line]:
  """Yields the lines of one preset and topology.

  Args:
    table: compiles them.
    preset: a name of config.presets.
    topology: a name that libtpu knows.
    weights: bytes of the base, which must fit on the devices that share them.
    contexts: sizes of the sequence axis.
    all_meshes: whether to continue after the first mesh that fits, for each size of the sequence axis.
    overrides: changes of the preset, KEY=VALUE,...
  """
  from univid_jax.planning.advice import fsdp_sizes

  num_chips = count_chips(topology)
  for context in contexts:
    if num_chips % context:
      continue
    for fsdp in fsdp_sizes(num_chips // context):
      if weights / (fsdp * context) > chip_of(topology).memory:
        continue
      line = table.line(Setup(preset, topology, fsdp, context, overrides))
      yield line
      if line.fits and not all_meshes:
        break


@app.command(FLAGS)
def main() -> None:
  if ONE.value:
    preset, topology, fsdp, context, *overrides = ONE.value.split()
    line = compile_setup(Setup(preset, topology, int(fsdp), int(context), *overrides))
    print("RESULT " + json.dumps(dataclasses.asdict(line)))
    return
  for preset in PRESET_NAMES.value:
    if preset not in PRESETS:
      raise UserError(f"--presets must be among {', '.join(PRESETS)}, got {preset!r}")
  for topology in TOPOLOGIES.value:
    count_chips(topology)
  for context in CONTEXTS.value:
    if not context.isdecimal() or int(context) == 0:
      raise UserError(f"--contexts must be numbers of devices, at least 1, got {context!r}")
  overrides = ",".join(OVERRIDE.value)
  table = Table(OUT.value)
  print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
  best: dict[tuple[str, str], Line] = {}
  for preset in PRESET_NAMES.value:
    weights = weight_bytes(preset, overrides)
    for topology in TOPOLOGIES.value:
      lines = table_lines(
        table,
        preset,
        topology,
        weights=weights,
        contexts=[int(context) for context in CONTEXTS.value],
        all_meshes=ALL.value,
        overrides=overrides,
      )
      for line in lines:
        print(line.to_markdown(), flush=True)
        previous = best.get((preset, topology))
        if line.fits and (previous is None or line.rows_per_s > previous.rows_per_s):
          best[preset, topology] = line
  for (preset, topology), line in best.items():
    print(f"best for {preset} on {topology}: data {line.data}, fsdp {line.fsdp}, context {line.context}")


if __name__ == "__main__":
  sys.exit(main())
