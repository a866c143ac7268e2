"""Reads the costs of a compiled program off its text: memory traffic, collectives and the TPU compiler's own cycles."""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES: tuple[str, ...] = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions without traffic of their own: names of values, and calls whose own instructions are counted.
NO_TRAFFIC = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "copy-done",
  "slice-done",
  "async-done",
  "async-update",
  "after-all",
  "iota",
  "partition-id",
  "replica-id",
  *(f"{name}{end}" for name in COLLECTIVES for end in ("", "-start", "-done")),
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
FLAG_BYTES = 8  # instructions that start a transfer also have flags in their type

LANES = 128  # channels that a TPU computes together
# Number of products per head in each kernel: over channels of keys (qk) and over channels of values (v).
PRODUCTS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2), "fused": (3, 2)}


def collective_bytes(text: str, num_layers: int) -> dict[str, float]:
  """Returns the bytes that one device moves, by kind of collective."""
  totals = dict.fromkeys(COLLECTIVES, 0.0)
  for times, computation in _executed(text, num_layers):
    for shapes, kind, start in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", computation):
      sizes = sorted(size for size in _sizes(shapes, on_chip=True) if size > FLAG_BYTES or not start)
      if start and kind in ("all-gather", "collective-permute"):  # their type has both input and output
        sizes = sizes[len(sizes) // 2 :]
      totals[kind] += times * sum(sizes)
  return totals


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction that runs on its own.

  Attributes:
    name: its name in the program, without number.
    source: the scopes and the operation that it comes from; for a fusion, those of its result.
    times: how often it runs.
    cycles: cycles of one run that the compiler expects; 0 for kernels.
    memory: bytes that one run reads from and writes to the device's memory.
  """

  name: str
  source: str
  times: int
  cycles: int
  memory: float


def find_instructions(text: str, num_layers: int) -> Iterator[Instruction]:
  """Yields the instructions of a program.

  Traffic is their inputs and outputs, except what the compiler keeps on the chip. An array with one entry per layer
  (weights, values stored for the backward pass) counts as one entry in a loop's body.
  """
  for times, computation in _executed(text, num_layers):
    stacked = num_layers if times > 1 else 0
    sizes: dict[str, float] = {}
    instructions = re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", computation, re.M)
    for name, shapes, kind, rest in instructions:
      made = _sizes(shapes, stacked)
      sizes[name] = sum(made)
      memory = 0.0
      if kind in ("slice", "dynamic-slice", "gather"):
        memory = 2 * sizes[name]
      elif kind in (
        "copy-start",
        "slice-start",
      ):  # of type (to, from, flag) or ((from), to, flag), in memory or on chip
        moved = min(sorted(_sizes(shapes, stacked, on_chip=True), reverse=True)[:2])
        memory = moved * sum(size > FLAG_BYTES for size in made)
      elif kind not in NO_TRAFFIC:
        read = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
        memory = sizes[name] + sum(sizes.get(argument, 0) for argument in read)
      cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
      source = re.search(r'op_name="([^"]*)"', rest)
      yield Instruction(
        name=re.sub(r"[.\d]+$", "", name),
        source=source[1] if source else "",
        times=times,
        cycles=int(cycles[1]) if cycles else 0,
        memory=memory,
      )


def memory_bytes(text: str, num_layers: int) -> float:
  """Returns the bytes that a program reads from and writes to the device's memory, see `find_instructions`."""
  return sum((each.times * each.memory for each in find_instructions(text, num_layers)), 0.0)


def estimated_cycles(text: str, num_layers: int) -> float:
  """Returns the cycles that the TPU compiler expects, without those of kernels (splash attention)."""
  return float(sum(each.times * each.cycles for each in find_instructions(text, num_layers)))


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A call of a Pallas kernel.

  Attributes:
    name: name of the kernel.
    inputs, outputs: shapes of its arrays of floating point numbers; integers are masks and indices.
  """

  name: str
  inputs: tuple[tuple[int, ...], ...]
  outputs: tuple[tuple[int, ...], ...]


def find_kernels(text: str, num_layers: int) -> Iterator[tuple[int, Kernel]]:
  """Yields the calls of Pallas kernels, each with how often it runs."""
  for times, computation in _executed(text, num_layers):
    for line in computation.splitlines():
      if 'custom_call_target="tpu_custom_call"' in line:
        yield times, _parse_kernel(line)


def kernel_operations(kernel: Kernel) -> tuple[str, float]:
  """Returns the kind of an attention kernel and its operations on whole arrays, padding included.

  The forward pass takes two products, the gradient of queries three (logits again), that of keys and values four, both
  fused five. Channels count in whole lanes, as the matrix unit computes them: 130 take as long as 256.

  Raises:
    ValueError: it is not a kernel of attention.
  """
  found = re.search(r"splash_\w*?(fwd|dq|dkv)", kernel.name)
  arrays = [shape for shape in kernel.inputs if len(shape) >= 3]
  if not found or len(arrays) < 3:
    raise ValueError(f"not a kernel of attention: {kernel}")
  q, k, v = arrays[:3]
  kind = {"fwd": "forward"}.get(found[1], found[1])
  if kind == "dkv" and sum(len(shape) >= 3 for shape in kernel.outputs) == 3:
    kind = "fused"
  qk, value = (-(-x[-1] // LANES) * LANES for x in (k, v))
  over_qk, over_v = PRODUCTS[kind]
  return kind, 2.0 * math.prod(q[:-1]) * k[-2] * (over_qk * qk + over_v * value)


def _executed(text: str, num_layers: int) -> Iterator[tuple[int, str]]:
  """Yields the computations that run on their own, each with the number of its runs.

  The body of a loop runs once per layer. If it chooses between two forms of a block, one is the last layer's and the
  other that of all layers before, as in `models.dit.DiT`.
  """
  computations: dict[str, str] = {}
  entry = ""
  for computation in re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text):
    if name := re.match(r"(ENTRY )?%?([\w.\-]+)", computation):
      computations[name[2]] = computation
      entry = name[2] if name[1] else entry
  times = {entry: 1}
  for body in set(re.findall(r"body=%?([\w.\-]+)", text)):
    times[body] = num_layers
    branches = re.findall(r"branch_computations=\{%?([\w.\-]+), %?([\w.\-]+)\}", computations[body])
    pairs = [(whole, last) for last, whole in branches]
    pairs += re.findall(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", computations[body])
    for whole, last in pairs:
      times[last], times[whole] = 1, num_layers - 1
  for name, count in times.items():
    yield count, computations[name]


def _sizes(shapes: str, num_layers: int = 0, *, on_chip: bool = False) -> list[float]:
  """Returns the bytes of each array of a type.

  Args:
    shapes: the type.
    num_layers: arrays with this first dim count as one entry; 0 for none.
    on_chip: whether to include arrays that the compiler keeps on the chip.
  """
  sizes = []
  for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shapes):
    if on_chip or "S(" not in layout:  # memory spaces other than the default are on the chip
      lengths = [int(length) for length in dims.split(",") if length]
      stacked = num_layers and lengths[:1] == [num_layers]
      sizes.append(BYTES.get(dtype, 4) * math.prod(lengths) / (num_layers if stacked else 1))
  return sizes


def _parse_kernel(line: str) -> Kernel:
  """Parses a call of a kernel: results precede the call, and operands are in the layout constraints."""
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  outputs, _, rest = rest.partition(" custom-call(")
  inputs = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest)

  def shapes(types: str) -> tuple[tuple[int, ...], ...]:
    found = re.findall(r"\b(?:bf16|f16|f32)\[([\d,]*)\]", types)
    return tuple(tuple(int(length) for length in dims.split(",") if length) for dims in found)

  return Kernel(re.sub(r"^%|\.\d+$", "", name), shapes(inputs[1] if inputs else ""), shapes(outputs))
