"""Training on TPUs that are not here: memory, traffic and a roofline, from the TPU compiler (`pip install libtpu`).

  python -m benchmarks.scaling [--presets=wan_1_3b,wan_14b] [--topologies=v5e:2x4,v5e:4x4,v5p:2x2x2] [--contexts=1,4]
      [--out=FILE.json]

For each preset and topology and a few meshes the step is compiled, about two minutes each; a mesh whose weights alone do not fit
is left out. Rows are those of the preset, one for each data x fsdp device. Memory is the compiler's. Times are lower bounds from
stated peaks (`performance.CHIPS`): operations by formula (with recomputation), bytes that collectives carry over the chip's
network; the larger of the two bounds the step.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from univid_jax import cli
from univid_jax.performance import CHIPS, chip_of, step_flops

PRESETS = flags.DEFINE_list("presets", ["wan_1_3b", "wan_14b"], "Of configs/video_tasks.py.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x4", "v5e:4x4", "v5p:2x2x2"], "Names that libtpu knows.")
CONTEXTS = flags.DEFINE_list("contexts", ["1", "4"], "Devices that share a row, to try.")
OUT = flags.DEFINE_string("out", "", "File for the table as JSON.")
ONE = flags.DEFINE_string("one", "", "PRESET TOPOLOGY FSDP CONTEXT: what each compilation is started with.")

# What JAX calls the chips of a topology.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


def collective_bytes(text: str, num_layers: int) -> dict[str, float]:
  """Bytes that one device takes part in, by kind, from a compiled program.

  Those in a loop's body count once a layer; where the body chooses between two forms of a block, one is the last layer's and the
  other that of all before, as in `models.dit.DiT`.
  """
  computations = {}
  for computation in re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text):
    if name := re.match(r"(?:ENTRY )?%?([\w.\-]+)", computation):
      computations[name[1]] = computation
  times = dict.fromkeys(computations, 1)
  for body in set(re.findall(r"body=%?([\w.\-]+)", text)):
    times[body] = num_layers
    for last, whole in re.findall(r"branch_computations=\{%?([\w.\-]+), %?([\w.\-]+)\}", computations[body]):
      times[last], times[whole] = 1, num_layers - 1
    for whole, last in re.findall(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", computations[body]):
      times[last], times[whole] = 1, num_layers - 1
  totals = dict.fromkeys(COLLECTIVES, 0.0)
  for name, computation in computations.items():
    for shapes, kind in re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
                                   computation):
      sizes = [BYTES.get(dtype, 4) * _product(dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
      totals[kind] += times[name] * max(sizes, default=0)
  return totals


def _product(dims: str) -> int:
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
  text = config.rows.num_text_tokens
  flops = rows * step_flops(dit, lora_rank=config.lora.rank, recompute=True, tokens=sum(lengths), text_tokens=text,
                            targets=sum(lengths) / 4, attended=sum(n * n for n in lengths), attended_text=sum(lengths) * text / 2)
  carried = collective_bytes(program.as_text(), dit.num_layers)
  compute, network = flops / mesh.size / chip.flops, sum(carried.values()) / chip.network
  return line | {"fits": memory.fits, "memory_gb": memory.total / 1e9, "of_gb": memory.memory / 1e9, "compute_s": compute,
                 "network_s": network, "bottleneck": "compute" if compute >= network else "network",
                 "rows_per_s": rows / max(compute, network), "collective_gb": {k: v / 1e9 for k, v in carried.items() if v}}


def meshes(chips: int, contexts: Sequence[int]) -> list[tuple[int, int]]:
  """(fsdp, context) to try; what is left is data: weights on every device, over eight, or over all of them."""
  return [(fsdp, context) for context in contexts if chips % context == 0
          for fsdp in sorted({1, 8, chips // context}) if (chips // context) % fsdp == 0]


def weight_bytes(preset: str) -> int:
  """Of the frozen base."""
  sys.path.insert(0, os.getcwd())
  import jax
  from flax import nnx

  from configs.video_tasks import get_config
  from univid_jax import build
  model = nnx.eval_shape(lambda: build.model(get_config(preset), adapters=False))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def main() -> None:
  if ONE.value:
    preset, topology, fsdp, context = ONE.value.split()
    print("RESULT " + json.dumps(compile_one(preset, topology, int(fsdp), int(context))))
    return
  try:
    import libtpu
  except ModuleNotFoundError as error:
    raise cli.UserError("compiling for a TPU needs its compiler: pip install libtpu") from error
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_LIBRARY_PATH": os.path.join(os.path.dirname(libtpu.__file__), "libtpu.so")}
  table = []
  names = ("preset", "topology", "data x fsdp x context", "a chip (GB)", "compute", "network", "bottleneck", "rows/s at most",
           "collectives (GB a chip)")
  print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
  for preset in PRESETS.value:
    weights = weight_bytes(preset)
    for topology in TOPOLOGIES.value:
      chips = _product(topology.partition(":")[2].replace("x", ","))
      kind = topology.partition(":")[0]
      if kind not in KINDS:
        raise cli.UserError(f"topologies are of {', '.join(KINDS)}, as v5e:2x4; got {topology}")
      memory = CHIPS[KINDS[kind]].memory
      for fsdp, context in meshes(chips, list(map(int, CONTEXTS.value))):
        if weights / (fsdp * context) > memory:
          continue
        # A process each: what one compilation leaves behind does not weigh on the next.
        command = [sys.executable, "-m", "benchmarks.scaling", f"--one={preset} {topology} {fsdp} {context}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        result = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
        if not result:
          raise cli.UserError(f"{preset} on {topology}: {done.stderr.strip().splitlines()[-1]}")
        line = json.loads(result[1])
        table.append(line)
        size = "?" if line["memory_gb"] is None else f"{line['memory_gb']:.1f}"
        head = f"| {preset} | {topology} | {line['data']} x {fsdp} x {context} | {size}"
        carried = ", ".join(f"{kind} {gb:.1f}" for kind, gb in line.get("collective_gb", {}).items() if gb >= 0.05)
        print(f"{head} of {line['of_gb']:.1f} | {line['compute_s']:.2f} s | {line['network_s']:.2f} s | {line['bottleneck']} | "
              f"{line['rows_per_s']:.2f} | {carried} |" if line["fits"] else f"{head}: does not fit" + " |" * 6, flush=True)
  for preset in PRESETS.value:
    for topology in TOPOLOGIES.value:
      fitting = [line for line in table if line["preset"] == preset and line["topology"] == topology and line["fits"]]
      if fitting:
        best = max(fitting, key=lambda line: line["rows_per_s"])
        print(f"best for {preset} on {topology}: data {best['data']}, fsdp {best['fsdp']}, context {best['context']}")
  if OUT.value:
    with open(OUT.value, "w") as file:
      json.dump(table, file, indent=2)


if __name__ == "__main__":
  cli.run(main)
