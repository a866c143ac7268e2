"""The costs of a training step besides the kernels of attention, ranked by the TPU compiler (`pip install '.[tpu]'`).

  python -m benchmarks.ranking [--preset=wan_1_3b] [--topology=v5e:1x1] [--fsdp=1] [--context=1]
      [--override=KEY=VALUE,...] [--top=25] [--save=FILE]
  python -m benchmarks.ranking --program=FILE --layers=30 [--top=25]

Compiles the step of a preset for TPUs that need not be present, or reads the text of a program that this or
`benchmarks.against_maxdiffusion` has saved. A row sums the instructions of one name that come from one operation of one
part of the model. Fusions, which contain further operations, are named by the compiler or after their result, whose
operation is listed; `copy` changes a layout. Cycles are the compiler's expectation; bytes are read and written, see
`programs.find_instructions`.
"""

import collections
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.bounds import num_layers
from benchmarks.programs import Instruction, find_instructions
from benchmarks.scaling import Setup
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.presets import PRESETS
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import count_chips, describe_devices, use_tpu_compiler

FLAGS = CommandFlags(__doc__)
PRESET = FLAGS.choice("preset", "wan_1_3b", list(PRESETS), "Whose step.")
TOPOLOGY = FLAGS.string("topology", "v5e:1x1", "Name that libtpu knows.")
FSDP = FLAGS.integer("fsdp", 1, "Size of the mesh's axis that shards weights.", lower_bound=1)
CONTEXT = FLAGS.integer("context", 1, "Size of the mesh's axis that shares a row.", lower_bound=1)
OVERRIDE = FLAGS.strings("override", [], "Changes of the preset, KEY=VALUE.")
PROGRAM = FLAGS.string("program", "", "File with the text of a program, instead of a preset.")
LAYERS = FLAGS.integer("layers", 30, "Layers of the model of --program.", lower_bound=1)
TOP = FLAGS.integer("top", 25, "Number of rows.", lower_bound=1)
SAVE = FLAGS.string("save", "", "File for the text of the program.")

# Components that transformations and control flow add to an instruction's source.
WRAPPERS = re.compile(
  r"(jit|pjit|jvp|vmap|transpose)\(.*\)|while|body|closed_call|checkpoint|rematted_computation|shard_map|cond|eval_jaxpr|"
  r"branch_\d+_fun"
)


def pass_of(source: str) -> str:
  """Returns the pass that an instruction belongs to."""
  if "rematted_computation" in source:
    return "recomputed"
  return "backward" if "transpose(" in source else "forward"


def place_of(source: str) -> str:
  """Returns the part of the model and the operation."""
  return "/".join(part for part in source.split("/") if not WRAPPERS.fullmatch(part)) or "-"


def rank(instructions: Iterable[Instruction], top: int) -> Iterator[str]:
  """Yields a table of the rows with the most cycles, and the share of each pass."""
  rows: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
  passes: collections.Counter[str] = collections.Counter()
  for each in instructions:
    row = rows[pass_of(each.source), place_of(each.source), each.name]
    for i, value in enumerate((1, each.cycles, each.memory)):
      row[i] += each.times * value
    passes[pass_of(each.source)] += each.times * each.cycles
  total = sum(passes.values()) or 1
  yield "| pass | part and operation | instruction | runs | 10^9 cycles | share | GB |"
  yield "|---|---|---|---|---|---|---|"
  for (kind, place, name), (runs, cycles, size) in sorted(rows.items(), key=lambda row: -row[1][1])[:top]:
    yield f"| {kind} | {place} | {name} | {runs} | {cycles / 1e9:.3f} | {cycles / total:.1%} | {size / 1e9:.1f} |"
  shares = ", ".join(f"{name} {cycles / total:.0%}" for name, cycles in passes.most_common())
  yield f"\n{total / 1e9:.3f} x 10^9 cycles without kernels: {shares}"


def compile_step(setup: Setup) -> str:
  """Returns the text of the program of a step; raises `DoesNotFitError` if the compiler refuses it."""
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.planning.forecasts import compile_training

  config = setup.config
  program, _ = compile_training(config, make_mesh(config.mesh, describe_devices(setup.topology)))
  return program.as_text() or ""


@app.command(FLAGS)
def main() -> None:
  if PROGRAM.value:
    if not Path(PROGRAM.value).is_file():
      raise UserError(f"--program: no such file: {PROGRAM.value}")
    text, layers = Path(PROGRAM.value).read_text(), LAYERS.value
  else:
    count_chips(TOPOLOGY.value)
    setup = Setup(PRESET.value, TOPOLOGY.value, FSDP.value, CONTEXT.value, ",".join(OVERRIDE.value))
    layers = num_layers(setup.config)
    use_tpu_compiler()
    text = compile_step(setup)
  if SAVE.value:
    Path(SAVE.value).write_text(text)
  print("\n".join(rank(find_instructions(text, layers), TOP.value)), flush=True)


if __name__ == "__main__":
  sys.exit(main())
