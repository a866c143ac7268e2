"""A comparison with MaxDiffusion without a TPU: both programs by the TPU compiler (`pip install '.[tpu]'`).

  python -m benchmarks.against_maxdiffusion --maxdiffusion=PATH [--cases=CASE,...] [--efficiency=0.5,0.25]
      [--out=FILE.jsonl]

PATH is the folder `src` of a clone of MaxDiffusion, whose own dependencies must be installed. A case is
TASK/MODEL/SIZE/TOPOLOGY, for example gradient/1.3b/480p/v5p:2x2x1. Tasks: forward (a step of denoising without
guidance), gradient (of all parameters), training (with AdamW). Both sides compile the same model in bfloat16, a row of
81 frames with 512 text tokens per data shard, context 4 and full remat, each in a separate process; MaxDiffusion with
its published blocks of flash attention, univid_jax with its own and with rows padded to whole blocks. With --out,
programs that the file already has are not compiled again.

The compiler does not estimate the cycles of kernels. They are counted here by one rule for both sides: the products of
whole padded arrays (`kernel_operations`), over the chip's peak times each --efficiency. `--cases=calibration/CHIP`
prints the efficiency that the compiler expects of the products of one block as plain XLA. Exponentials, masks, and the
start and end of blocks are not counted.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import FigureFile
from benchmarks.peer_programs import MODELS, PEAK, Case, lower_maxdiffusion, lower_ours
from benchmarks.programs import LANES, collective_bytes, estimated_cycles, find_kernels, kernel_operations, memory_bytes
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import describe_devices, use_tpu_compiler

DEFAULT_CASES = (
  *(f"{task}/1.3b/480p/{topology}" for topology in ("v5p:2x2x1", "v6e:2x2") for task in ("forward", "gradient")),
  *(f"training/1.3b/480p/{topology}" for topology in ("v5p:2x2x1", "v6e:2x2")),
  *(f"{task}/14b/480p/v5p:2x2x2" for task in ("forward", "training")),
  *(f"{task}/1.3b/720p/v5p:2x2x1" for task in ("forward", "training")),
  *(f"{task}/14b/720p/v5p:2x2x2" for task in ("forward", "training")),
)
# From its README; without it the compiler refuses these blocks.
OPTIONS = {"maxdiffusion": {"xla_tpu_scoped_vmem_limit_kib": "65536"}, "univid_jax": {}}
FLAGS = CommandFlags(__doc__)
MAXDIFFUSION = FLAGS.string("maxdiffusion", "", "Folder from which MaxDiffusion is imported.")
CASES = FLAGS.strings("cases", list(DEFAULT_CASES), "TASK/MODEL/SIZE/TOPOLOGY, or calibration/CHIP.")
EFFICIENCY = FLAGS.strings("efficiency", ["0.5", "0.25"], "Shares of the chip's peak that kernels are taken to reach.")
OUT = FLAGS.string("out", "", "File for the figures, one line of JSON per program; an existing file is continued.")
SAVE = FLAGS.string("save", "", "File for the text of the program of --one.")
ONE = FLAGS.string("one", "", "SIDE CASE: compiles one program; used internally.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What a compiled program costs each device.

  Attributes:
    case, side: what was compiled, and whose.
    cycles: cycles that the compiler expects, without kernels.
    kernels: operations of the kernels by kind.
    memory_tb: traffic, read and written; for kernels only inputs and outputs.
    temporary_gb: memory besides inputs.
    collective_gb: traffic of collectives.
    seconds: time of compilation.
  """

  case: str
  side: str
  cycles: float
  kernels: dict[str, float]
  memory_tb: float
  temporary_gb: float
  collective_gb: float
  seconds: float

  def total(self, efficiency: float) -> float:
    """Returns the cycles, kernels included at a share of the chip's peak."""
    return self.cycles + sum(self.kernels.values()) / (PEAK[Case.parse(self.case).chip] * efficiency)


def compile_side(side: str, case: Case) -> Program:
  """Compiles a program in this process, for TPUs that need not exist."""
  use_tpu_compiler()
  from univid_jax.models.variants import VARIANTS

  lowered = lower_maxdiffusion(case, MAXDIFFUSION.value) if side == "maxdiffusion" else lower_ours(case)
  start = time.monotonic()
  compiled = lowered.compile(OPTIONS[side])
  seconds = time.monotonic() - start
  text, num_layers = compiled.as_text(), VARIANTS[MODELS[case.model]].num_layers
  if SAVE.value:
    Path(SAVE.value).write_text(text)
  kernels: dict[str, float] = {}
  for times, kernel in find_kernels(text, num_layers):
    kind, operations = kernel_operations(kernel)
    kernels[kind] = kernels.get(kind, 0.0) + times * operations
  return Program(
    case="/".join(dataclasses.astuple(case)),
    side=side,
    cycles=estimated_cycles(text, num_layers),
    kernels=kernels,
    memory_tb=memory_bytes(text, num_layers) / 1e12,
    temporary_gb=compiled.memory_analysis().temp_size_in_bytes / 1e9,
    collective_gb=sum(collective_bytes(text, num_layers).values()) / 1e9,
    seconds=seconds,
  )


def calibrate(chip: str) -> dict[str, float]:
  """Returns the shares of a chip's peak that plain products reach in the compiler's own cycles.

  The products are those of a block of attention (queries by keys, the result by values, all in the chip's own memory),
  and of large square matrices.
  """
  use_tpu_compiler()
  import jax
  import jax.numpy as jnp

  topology = f"{chip}:2x2x1" if chip == "v5p" else f"{chip}:2x2"
  place = jax.sharding.SingleDeviceSharding(describe_devices(topology)[0])

  def cycles(run: Callable[..., Any], *shapes: tuple[int, ...]) -> float:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    text = jax.jit(run).lower(*inputs).compile().as_text() or ""
    return estimated_cycles(text, 1)

  found = {"square": 2 * 8192**3 / cycles(lambda a, b: a @ b, (8192, 8192), (8192, 8192)) / PEAK[chip]}
  for queries, keys in ((512, 1024), (3072, 2048), (4096, 4096), (8192, 8192)):
    spent = cycles(lambda q, k, v: (q @ k.T) @ v, (queries, LANES), (keys, LANES), (keys, LANES))
    found[f"block {queries} x {keys}"] = 4 * queries * keys * LANES / spent / PEAK[chip]
  return found


class Table:
  """Programs by case and side; compiles those that its file lacks, each in a separate process."""

  def __init__(self, path: str | Path):
    self._file = FigureFile(path)
    self._programs = {(each.case, each.side): each for each in (Program(**line) for line in self._file.lines)}

  def program(self, case: str, side: str) -> Program:
    """Returns a program; raises UserError with the last line of the output if it does not compile."""
    if (case, side) not in self._programs:
      command = [sys.executable, "-m", "benchmarks.against_maxdiffusion", f"--one={side} {case}"]
      done = subprocess.run([*command, f"--maxdiffusion={MAXDIFFUSION.value}"], capture_output=True, text=True)
      found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
      if not found:
        raise UserError(f"{side} {case}: {(done.stderr.strip() or 'it was killed').splitlines()[-1]}")
      program = self._programs[case, side] = Program(**json.loads(found[1]))
      print(json.dumps(dataclasses.asdict(program)), flush=True)
      self._file.add(dataclasses.asdict(program))
    return self._programs[case, side]


def to_markdown(peer: Program, ours: Program, efficiencies: list[float]) -> str:
  """Returns the row of a case: figures of MaxDiffusion / ours, with ratios in the columns of totals."""
  peak = PEAK[Case.parse(peer.case).chip]
  both = [(each.cycles / 1e9, sum(each.kernels.values()) / peak / 1e9) for each in (peer, ours)]
  cells = [peer.case, *(" / ".join(f"{value:.3f}" for value in pair) for pair in zip(*both))]
  for efficiency in efficiencies:
    totals = [each.total(efficiency) for each in (peer, ours)]
    cells.append(f"{totals[0] / 1e9:.2f} / {totals[1] / 1e9:.2f} = {totals[0] / totals[1]:.2f}")
  for name in ("memory_tb", "temporary_gb", "collective_gb", "seconds"):
    digits = 0 if name == "seconds" else 2
    cells.append(" / ".join(f"{getattr(each, name):.{digits}f}" for each in (peer, ours)))
  return f"| {' | '.join(cells)} |"


@app.command(FLAGS)
def main() -> None:
  if ONE.value:
    side, text = ONE.value.split()
    print("RESULT " + json.dumps(dataclasses.asdict(compile_side(side, Case.parse(text)))))
    return
  cases = [text for text in CASES.value if not text.startswith("calibration/")]
  for text in cases:
    Case.parse(text)
  chips = [text.removeprefix("calibration/") for text in CASES.value if text not in cases]
  if unknown := set(chips) - set(PEAK):
    raise UserError(f"--cases: calibration takes {', '.join(PEAK)}, got {unknown.pop()!r}")
  try:
    efficiencies = [float(value) for value in EFFICIENCY.value]
  except ValueError:
    efficiencies = []
  if not efficiencies or not all(0 < value <= 1 for value in efficiencies):
    raise UserError(f"--efficiency must be shares above 0 and up to 1, got {','.join(EFFICIENCY.value)!r}")
  if cases and not (Path(MAXDIFFUSION.value) / "maxdiffusion").is_dir():
    raise UserError(f"--maxdiffusion must be the folder with the package maxdiffusion, got {MAXDIFFUSION.value!r}")
  for chip in chips:
    shares = ", ".join(f"{name}: {share:.2f}" for name, share in calibrate(chip).items())
    print(f"{chip}, share of the peak: {shares}", flush=True)
  table, rows = Table(OUT.value), []
  for text in cases:
    try:
      rows.append(to_markdown(table.program(text, "maxdiffusion"), table.program(text, "univid_jax"), efficiencies))
    except UserError as error:
      print(error, flush=True)
  columns = ["case", "e9 cycles without kernels", "e9 cycles of kernels at peak"]
  columns += [f"e9 in all, kernels at {value} of peak" for value in efficiencies]
  columns += ["TB of memory traffic", "GB temporary", "GB of collectives", "s to compile"]
  print("\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]))


if __name__ == "__main__":
  sys.exit(main())
