"""Training on TPUs that are not here: memory, traffic and a roofline, from the TPU compiler (`pip install '.[tpu]'`).

  python -m benchmarks.scaling [--presets=wan_1_3b,wan_14b] [--topologies=v5e:2x4,v5p:2x2x2,v6e:2x4] [--contexts=1,4] [--all]
      [--out=FILE.jsonl]

For each preset, topology and number of devices that share a row the step is compiled on the meshes that could hold the weights,
from the least traffic on (weights on every chip, then spread over eight, then over all), until one fits; with --all on all of
them. Each takes two to five minutes; with --out those that the file has already are not compiled again. Rows are those of the
preset, one for each data x fsdp device. Memory is the compiler's. Times are lower bounds from stated peaks
(`performance.CHIPS`): operations by formula (with recomputation), bytes that the program reads and writes, bytes that its
collectives carry; the largest of the three bounds the step. The file also has the cycles that the compiler itself expects for all
but attention.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from univid_jax import cli
from univid_jax.performance import CHIPS, chip_of, step_flops

PRESETS = flags.DEFINE_list("presets", ["wan_1_3b", "wan_14b"], "Of configs/video_tasks.py.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"], "Names that libtpu knows.")
CONTEXTS = flags.DEFINE_list("contexts", ["1", "4"], "Devices that share a row, to try.")
ALL = flags.DEFINE_bool("all", False, "All meshes, not only up to the first that fits.")
OUT = flags.DEFINE_string("out", "", "File for the table, a line of JSON for each program; gone on with where it is there.")
ONE = flags.DEFINE_string("one", "", "PRESET TOPOLOGY FSDP CONTEXT: what each compilation is started with.")

# What JAX calls the chips of a topology.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves nothing by itself: names of values, and calls whose own instructions are counted.
NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
              "slice-done", "async-done", "async-update", "after-all", "iota", "partition-id", "replica-id",
              *(f"{name}{end}" for name in COLLECTIVES for end in ("", "-start", "-done")))
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


def executed(text: str, num_layers: int) -> Iterator[tuple[int, str]]:
  """The computations of a compiled program that are run as such, each with how often.

  A loop's body runs once a layer; where the body chooses between two forms of a block, one is the last layer's and the other
  that of all before, as in `models.dit.DiT`.
  """
  computations, entry = {}, ""
  for computation in re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text):
    if name := re.match(r"(ENTRY )?%?([\w.\-]+)", computation):
      computations[name[2]] = computation
      entry = name[2] if name[1] else entry
  times = {entry: 1}
  for body in set(re.findall(r"body=%?([\w.\-]+)", text)):
    times[body] = num_layers
    pairs = [(whole, last) for last, whole in
             re.findall(r"branch_computations=\{%?([\w.\-]+), %?([\w.\-]+)\}", computations[body])]
    pairs += re.findall(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", computations[body])
    for whole, last in pairs:
      times[last], times[whole] = 1, num_layers - 1
  for name, count in times.items():
    yield count, computations[name]


def collective_bytes(text: str, num_layers: int) -> dict[str, float]:
  """Bytes that one device takes part in, by kind, from a compiled program."""
  totals = dict.fromkeys(COLLECTIVES, 0.0)
  for times, computation in executed(text, num_layers):
    for shapes, kind, start in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", computation):
      sizes = sorted(size for size in _sizes(shapes, on_chip=True) if size > 8 or not start)
      if start and kind in ("all-gather", "collective-permute"):  # what starts them has the type of what goes in and comes out
        sizes = sizes[len(sizes) // 2:]
      totals[kind] += times * sum(sizes)
  return totals


def memory_bytes(text: str, num_layers: int) -> float:
  """Bytes that a compiled program reads from the device's memory and writes there: what goes into and comes out of each of its
  instructions, but for what the compiler keeps on the chip.

  What has an entry for each layer (weights, what is kept for the backward pass) counts within a loop as one entry.
  """
  total = 0.0
  for times, computation in executed(text, num_layers):
    sizes = {}
    for name, shapes, kind, arguments in re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", computation, re.M):
      made = _sizes(shapes, num_layers if times > 1 else 0)
      sizes[name] = sum(made)
      if kind in ("slice", "dynamic-slice", "gather"):
        total += times * 2 * sizes[name]
      elif kind in ("copy-start", "slice-start"):  # of type (to, from, flag) or ((from), to, flag), each here or on the chip
        moved = min(sorted(_sizes(shapes, num_layers if times > 1 else 0, on_chip=True), reverse=True)[:2])
        total += times * moved * sum(size > 8 for size in made)
      elif kind not in NO_TRAFFIC:
        read = re.findall(r"%([\w.\-]+)", re.match(r"[^)]*", arguments)[0])
        total += times * (sizes[name] + sum(sizes.get(argument, 0) for argument in read))
  return total


def estimated_cycles(text: str, num_layers: int) -> float:
  """Cycles that the TPU's compiler expects a program to take; of kernels (splash attention) it expects nothing."""
  return float(sum(times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', computation)))
                   for times, computation in executed(text, num_layers)))


def _sizes(shapes: str, num_layers: int = 0, *, on_chip: bool = False) -> list[float]:
  """Bytes of each array of a type, of those on the chip only if asked; of one entry where the first dim is `num_layers`."""
  sizes = []
  for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shapes):
    if on_chip or "S(" not in layout:  # other memory spaces are on the chip
      first = dims.partition(",")[0]
      sizes.append(BYTES.get(dtype, 4) * product(dims) / (num_layers if num_layers and first == str(num_layers) else 1))
  return sizes


def product(dims: str) -> int:
  """Of numbers with commas between."""
  count = 1
  for n in filter(None, dims.split(",")):
    count *= int(n)
  return count


def compile_one(preset: str, topology: str, fsdp: int, context: int) -> dict:
  """One line of the table."""
  sys.path.insert(0, os.getcwd())
  from jax.experimental import topologies

  from configs.video_tasks import get_config
  from univid_jax import build
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training.forecast import forecast_with_program

  config = get_config(preset)
  config.mesh.update({"data": -1, "fsdp": fsdp, "context": context})
  mesh = make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  dit, rows = build.transformer_config(config), build.rows_per_batch(config, mesh)
  chip = chip_of(mesh.devices.flat[0])
  line = {"preset": preset, "topology": topology, "data": mesh.shape["data"], "fsdp": fsdp, "context": context}
  try:
    memory, program = forecast_with_program(config, mesh)
  except ValueError as error:
    needed = re.search(r"\((\d+\.\d+)G\)", str(error))
    return line | {"fits": False, "memory_gb": float(needed[1]) * 1.0737 if needed else None}
  # A row as `wan_1_3b` packs it: one sentence of context I and one of II.
  lengths = (31200, 6240)
  text_tokens = config.rows.num_text_tokens
  flops = rows * step_flops(dit, lora_rank=config.lora.rank, recompute=True, tokens=sum(lengths), text_tokens=text_tokens,
                            targets=sum(lengths) / 4, attended=sum(n * n for n in lengths),
                            attended_text=sum(lengths) * text_tokens / 2)
  text = program.as_text()
  carried = collective_bytes(text, dit.num_layers)
  bounds = {"compute": flops / mesh.size / chip.flops, "memory": memory_bytes(text, dit.num_layers) / chip.bandwidth,
            "network": sum(carried.values()) / chip.network}
  return line | {"fits": memory.fits, "memory_gb": memory.total / 1e9, "of_gb": memory.memory / 1e9, "seconds": bounds,
                 "bottleneck": max(bounds, key=bounds.get), "rows_per_s": rows / max(bounds.values()),
                 "collective_gb": {k: v / 1e9 for k, v in carried.items() if v},
                 "estimated_cycles": estimated_cycles(text, dit.num_layers)}


def meshes(chips: int, context: int) -> list[int]:
  """Sizes of fsdp to try, from the least traffic on: weights on every device, over eight, or over all of them."""
  rest = chips // context
  return [fsdp for fsdp in sorted({1, 8, rest}) if rest % fsdp == 0]


def weight_bytes(preset: str) -> int:
  """Of the frozen base."""
  sys.path.insert(0, os.getcwd())
  import jax
  from flax import nnx

  from configs.video_tasks import get_config
  from univid_jax import build
  model = nnx.eval_shape(lambda: build.model(get_config(preset), adapters=False))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def compile_apart(preset: str, topology: str, fsdp: int, context: int) -> dict:
  """One line of the table, from a process of its own: what one compilation leaves behind does not weigh on the next.

  Raises:
    UserError: it failed; the message has the last line of what it said.
  """
  import libtpu
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_LIBRARY_PATH": os.path.join(os.path.dirname(libtpu.__file__), "libtpu.so")}
  command = [sys.executable, "-m", "benchmarks.scaling", f"--one={preset} {topology} {fsdp} {context}"]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if result := re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE):
    return json.loads(result[1])
  raise cli.UserError(f"{preset} on {topology}: {(done.stderr.strip() or 'it was ended').splitlines()[-1]}")


def shown(line: dict) -> str:
  """A line of the table in Markdown."""
  size = "?" if line["memory_gb"] is None else f"{line['memory_gb']:.1f}"
  cells = [line["preset"], line["topology"], f"{line['data']} x {line['fsdp']} x {line['context']}"]
  if line["fits"]:
    carried = ", ".join(f"{kind} {gb:.1f}" for kind, gb in line["collective_gb"].items() if gb >= 0.05)
    cells += [f"{size} of {line['of_gb']:.1f}", *(f"{line['seconds'][name]:.2f} s" for name in ("compute", "memory", "network")),
              line["bottleneck"], f"{line['rows_per_s']:.2f}", carried or "under 0.05"]
  else:
    cells += [f"{size}: does not fit", *[""] * 6]
  return f"| {' | '.join(cells)} |"


def main() -> None:
  if ONE.value:
    preset, topology, fsdp, context = ONE.value.split()
    print("RESULT " + json.dumps(compile_one(preset, topology, int(fsdp), int(context))))
    return
  try:
    import libtpu  # noqa: F401
  except ModuleNotFoundError as error:
    raise cli.UserError("compiling for a TPU needs its compiler: pip install '.[tpu]'") from error
  for topology in TOPOLOGIES.value:
    if topology.partition(":")[0] not in KINDS:
      raise cli.UserError(f"topologies are of {', '.join(KINDS)}, as v5e:2x4; got {topology}")
  known = [json.loads(line) for line in Path(OUT.value).read_text().splitlines()] if Path(OUT.value).is_file() else []
  names = ("preset", "topology", "data x fsdp x context", "a chip (GB)", "compute", "memory", "network", "bottleneck",
           "rows/s at most", "collectives (GB a chip)")
  print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
  table = []
  for preset in PRESETS.value:
    weights = weight_bytes(preset)
    for topology in TOPOLOGIES.value:
      for line in lines_of(preset, topology, weights, list(map(int, CONTEXTS.value)), known):
        table.append(line)
        print(shown(line), flush=True)
  for preset in PRESETS.value:
    for topology in TOPOLOGIES.value:
      fitting = [line for line in table if line["preset"] == preset and line["topology"] == topology and line["fits"]]
      if fitting:
        best = max(fitting, key=lambda line: line["rows_per_s"])
        print(f"best for {preset} on {topology}: data {best['data']}, fsdp {best['fsdp']}, context {best['context']}")


def lines_of(preset: str, topology: str, weights: int, contexts: Sequence[int], known: Sequence[dict]) -> Iterator[dict]:
  """The table's lines for one preset and topology; those that are new are added to the file."""
  kind, _, sides = topology.partition(":")
  chips = product(sides.replace("x", ","))
  for context in contexts:
    if chips % context:
      continue
    for fsdp in meshes(chips, context):
      if weights / (fsdp * context) > CHIPS[KINDS[kind]].memory:
        continue
      wanted = dict(preset=preset, topology=topology, fsdp=fsdp, context=context)
      line = next((line for line in known if wanted.items() <= line.items()), None)
      if line is None:
        line = compile_apart(**wanted)
        if OUT.value:
          with open(OUT.value, "a") as file:
            file.write(json.dumps(line) + "\n")
      yield line
      if line["fits"] and not ALL.value:
        break


if __name__ == "__main__":
  cli.run(main)
