"""Trains a small LoRA in two processes under random faults, over and over, and compares with an undisturbed run.

  python -m benchmarks.soak [--minutes=120] [--seed=S] [--faults=6] [--folder=DIR] [--out=FILE.json]

After every fault the same command is rerun, until the run is complete. Every end is checked: the exit code is a
documented one, with one clear line and no traceback, and metrics.jsonl has each step once, in order. In the end losses
and the exported LoRA equal those of the undisturbed run bit for bit. Needs a clone, since the base is among its tests.

Run N of seed S draws its faults from S and N. Slow storage and clock jumps affect only Python, not native libraries:
more would need root.
"""

import collections
import dataclasses
import json
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks.attempts import NUM_STEPS, ROOT, Attempt
from benchmarks.faults import FAULTS, Fault, KillBoth, Site, write_pairs
from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
MINUTES = FLAGS.integer("minutes", 120, "After this time no further fault happens.", lower_bound=1)
SEED = FLAGS.integer("seed", None, "Seed of the faults; default: a random one.")
NUM_FAULTS = FLAGS.integer("faults", 6, "Faults of a run.", lower_bound=0)
FOLDER = FLAGS.string("folder", None, "Folder for the runs, kept; default: a temporary one, kept after a mismatch.")
OUT = FLAGS.string("out", "", "File for the counts as JSON.")

MEASURED = {"step_time", "tokens_per_second", "goodput"}  # these differ from run to run


# The step before which a fault happens or, during the start, the seconds after the processes have joined; and the
# fault.
Next = tuple[int, float | None, Fault]


@dataclasses.dataclass
class Count:
  """The effects of a fault.

  Attributes:
    number: how often it happened.
    codes: exit codes of all processes afterwards.
  """

  number: int = 0
  codes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


class Soak:
  """Repeats a run under faults.

  Args:
    folder: folder for the runs.
    seed: seed of the faults.
    seconds: time after which no further fault happens.

  Attributes:
    problems: the problems found, one line each.
    counts: effects of the faults, by name.
    attempts: number of starts of the command.
  """

  def __init__(self, folder: Path, seed: int, *, seconds: float):
    self.folder, self.seed, self.attempts = folder, seed, 0
    self._started, self._seconds = time.monotonic(), seconds
    self.problems: list[str] = []
    self.counts: dict[str, Count] = collections.defaultdict(Count)
    self.undisturbed = self.site("undisturbed")

  @property
  def minutes(self) -> float:
    return (time.monotonic() - self._started) / 60

  @property
  def is_over(self) -> bool:
    return 60 * self.minutes > self._seconds

  def site(self, name: str) -> Site:
    """Returns the files of a run; runs share data and base."""
    return Site(self.folder / "base", self.folder / "pairs", self.folder / "programs", self.folder / name)

  def prepare(self) -> None:
    """Writes data and base, and makes the undisturbed run."""
    from univid_jax.convert.commands import convert_any

    release = ROOT / "tests" / "goldens" / "tiny_wan"
    if not release.exists():
      raise UserError(f"{release} is missing: run this in a clone")
    write_pairs(self.folder / "pairs")
    convert_any(str(release), str(self.folder / "base"))
    self.attempt(self.undisturbed, [])
    if self.problems:
      raise UserError(f"the undisturbed run failed: {self.problems[0]}; see {self.folder / 'logs'}")

  def run(self, number: int) -> None:
    """Makes one run under faults, and compares it with the undisturbed run."""
    rng = random.Random(f"{self.seed} {number}")
    kinds = [rng.choice(FAULTS) for _ in range(NUM_FAULTS.value)]
    steps = sorted(rng.sample(range(1, NUM_STEPS - 2), len(kinds)))
    delays = [rng.uniform(0, 8) if rng.random() < 0.2 else None for _ in kinds]
    faults = [kind(random.Random(rng.random())) for kind in kinds]
    queue = list(zip(steps, delays, faults, strict=True))
    site, start = self.site(f"run_{number}"), len(self.problems)
    for _ in range(3 * len(queue) + 3):
      if self.is_over:
        queue.clear()
      if self.attempt(site, queue):
        break
    else:
      self.problems.append(f"{site.workdir.name}: the run does not come to an end")
    self.problems += [f"{site.workdir.name}: {problem}" for problem in differences(self.undisturbed, site)]
    if len(self.problems) == start:
      shutil.rmtree(site.workdir)

  def attempt(self, site: Site, queue: list[Next]) -> bool:
    """Starts the command, lets the next faults happen, and checks the end; returns whether the run is complete.

    Args:
      site: files of the run.
      queue: the faults; those that have happened are removed.
    """
    happened: list[Fault] = []
    if queue and queue[0][2].starts:
      self.happen(queue.pop(0)[2], site, None, happened)
    conditions = happened[0].conditions if happened else ({}, {})
    self.attempts += 1
    logs = self.folder / "logs" / f"{site.workdir.name}-{self.attempts}"
    with Attempt(site, logs, conditions) as attempt:
      while queue:
        step, delay, fault = queue[0]
        if not (attempt.wait_for(step) if delay is None else attempt.wait_seconds(delay)):
          break
        if fault.starts:  # files are damaged by a power failure, which also kills the processes
          self.happen(KillBoth(random.Random(0)), site, attempt, happened)
          break
        self.happen(queue.pop(0)[2], site, attempt, happened)
      problems = attempt.finish()
    for fault in happened:
      fault.undo(site)
      self.counts[fault.name].codes.update(attempt.codes)
    problems += check_end(attempt, site, [fault.name for fault in happened], {c for f in happened for c in f.codes})
    for problem in problems:
      self.problems.append(f"{site.workdir.name}, attempt {self.attempts}: {problem}")
      print(f"  wrong: {self.problems[-1]}", flush=True)
    names = ", ".join(map(str, happened)) or "undisturbed"
    print(f"  {site.workdir.name}, attempt {self.attempts}: {names}: exit codes {attempt.codes}", flush=True)
    return attempt.codes == (0, 0)

  def happen(self, fault: Fault, site: Site, attempt: Attempt | None, happened: list[Fault]) -> None:
    if fault.happen(site, attempt):
      self.counts[fault.name].number += 1
      happened.append(fault)


def check_end(attempt: Attempt, site: Site, faults: Sequence[str], codes: set[int]) -> list[str]:
  """Returns the problems with the end of an attempt.

  Args:
    attempt: an attempt that has ended.
    site: files of the run.
    faults: faults that happened to it.
    codes: exit codes that are correct after them, besides 0.
  """
  problems = []
  for index, code in enumerate(attempt.codes):
    endings, others = attempt.endings(index)
    if code not in codes | {0}:
      problems.append(f"process {index} has exit code {code} after {faults or 'nothing'}: {endings}")
    if code != -signal.SIGKILL and len(endings) != (code != 0):
      problems.append(f"process {index} ends with {code} and {len(endings)} lines after {faults}: {endings}")
    if others:
      problems.append(f"process {index} prints after {faults}: {others[:5]}")
    problems += [f"process {index}: {line}" for line in endings if "internal error" in line]
  steps = [row["step"] for row in read_metrics(site)]
  if steps != list(range(1, len(steps) + 1)):
    problems.append(f"metrics.jsonl has the steps {steps}")
  return problems


def differences(expected: Site, found: Site) -> list[str]:
  """Returns the differences of a complete run from the undisturbed one."""
  problems = []
  rows = [
    [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(site)]
    for site in (expected, found)
  ]
  if rows[0] != rows[1]:
    first = next((a["step"] for a, b in zip(*rows) if a != b), min(map(len, rows)) + 1)
    problems.append(f"metrics differ from step {first}")
  if read_lora(expected) != read_lora(found):
    problems.append("the LoRA differs")
  return problems


def read_lora(site: Site) -> dict[str, object] | None:
  """Reads metadata and the bits of all weights; None if there is no LoRA.

  The checksum is left out: it covers the header, in which safetensors orders the metadata randomly.
  """
  path = site.workdir / "lora.safetensors"
  if not path.exists():
    return None
  with safe_open(path, "np") as file:
    metadata = {key: value for key, value in file.metadata().items() if key != "univid_checksum"}
  return {"metadata": metadata, **{name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}}


def read_metrics(site: Site) -> list[dict[str, float]]:
  """Reads the metrics, without a last line that was cut off."""
  path = site.workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def print_table(soak: Soak) -> None:
  print("\n| fault | times | exit codes of the processes |\n|---|---|---|")
  for name, count in sorted(soak.counts.items()):
    codes = ", ".join(f"{code}: {number}" for code, number in sorted(count.codes.items()))
    print(f"| {name} | {count.number} | {codes} |")


@app.command(FLAGS)
def main() -> None:
  seed = secrets.randbelow(10**6) if SEED.value is None else SEED.value
  folder = Path(FOLDER.value or tempfile.mkdtemp(prefix="soak-")).absolute()
  print(f"seed {seed}, in {folder}", flush=True)
  soak, number = Soak(folder, seed, seconds=60 * MINUTES.value), 0
  soak.prepare()
  while number == 0 or not soak.is_over:
    number += 1
    print(f"run {number} of seed {seed}, after {soak.minutes:.1f} minutes", flush=True)
    soak.run(number)
  print_table(soak)
  faults = sum(count.number for count in soak.counts.values())
  print(
    f"\nseed {seed}: {number} runs, {soak.attempts} starts, {faults} faults in {soak.minutes:.0f} minutes", flush=True
  )
  counts = {name: {"times": count.number, "codes": dict(count.codes)} for name, count in soak.counts.items()}
  figures = {"seed": seed, "minutes": soak.minutes, "runs": number, "starts": soak.attempts, "faults": counts}
  write_json(OUT.value, {**figures, "problems": soak.problems})
  if soak.problems:
    raise UserError(f"{len(soak.problems)} faults were not survived, first {soak.problems[0]}; logs are in {folder}")
  print("losses and LoRAs equal those of the undisturbed run to the bit")
  if not FOLDER.value:
    shutil.rmtree(folder)


if __name__ == "__main__":
  sys.exit(main())
