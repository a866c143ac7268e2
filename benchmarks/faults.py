"""The faults of the soak test, which happen to the processes and files of a run."""

import dataclasses
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from univid_jax.data.media.writer import write_clip

NUM_PAIRS = 4
SIZE = (16, 32)
HEARTBEAT_SECONDS = 20

Conditions = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Site:
  """The files of a run.

  Attributes:
    base: the converted checkpoint that it starts from.
    pairs: its data, pairs of images.
    programs: the compilation cache.
    workdir: workdir of the run.
  """

  base: Path
  pairs: Path
  programs: Path
  workdir: Path

  @property
  def checkpoints(self) -> list[Path]:
    """The checkpoints that have checksums, oldest first."""
    folders = [path.parent for path in self.workdir.glob("checkpoints/*/checksums.xxh128")]
    return sorted((path for path in folders if path.name.isdecimal()), key=lambda path: int(path.name))

  @property
  def clips(self) -> list[Path]:
    return sorted(self.pairs.rglob("*.png"))

  @property
  def cached(self) -> list[Path]:
    return sorted(self.workdir.glob("cache/*/*/*.safetensors"))


class Processes(Protocol):
  """The running processes of a run."""

  def send(self, number: signal.Signals, index: int) -> None: ...


@dataclasses.dataclass
class Fault:
  """A fault that happens once.

  Attributes:
    rng: draws the details.
    name: name in the table.
    codes: exit codes that the processes may have, besides 0 of a complete run.
    starts: whether it happens while the processes do not run.
    conditions: conditions of each process, if it happens while they run.
  """

  rng: random.Random
  name = ""
  codes = (0,)
  starts = False
  conditions: tuple[Conditions, Conditions] = ({}, {})

  def __str__(self) -> str:
    return f"{self.name} {self.conditions}" if any(self.conditions) else self.name

  def happen(self, site: Site, processes: Processes | None) -> bool:
    """Makes the fault happen; returns False if there is nothing that it could happen to."""
    del site, processes
    return True

  def undo(self, site: Site) -> None:
    """Restores what must be restored before the command is rerun."""


class Signals(Fault):
  """A signal to one or both processes."""

  number = signal.SIGKILL
  both = False
  seconds_apart = 0.0

  def happen(self, site: Site, processes: Processes | None) -> bool:
    assert processes is not None
    first = self.rng.randrange(2)
    processes.send(self.number, first)
    if self.both:
      time.sleep(self.seconds_apart)
      processes.send(self.number, 1 - first)
    return True


class KillOne(Signals):
  name = "kill -9 of one process"
  codes = (-9, 1)


class KillBoth(Signals):
  name = "kill -9 of both processes"
  codes = (-9, 1)  # killed one after the other, on a busy machine late enough for the second to notice
  both = True


class TerminateOne(Signals):
  name = "SIGTERM to one process"
  number = signal.SIGTERM
  codes = (75,)


class TerminateBoth(TerminateOne):
  name = "SIGTERM to both, half a second apart"
  both = True
  seconds_apart = 0.5


class Suspend(Fault):
  name = "SIGSTOP and SIGCONT after 1 to 5 seconds"

  def seconds(self) -> float:
    return self.rng.uniform(1, 5)

  def happen(self, site: Site, processes: Processes | None) -> bool:
    assert processes is not None
    index = self.rng.randrange(2)
    processes.send(signal.SIGSTOP, index)
    time.sleep(self.seconds())
    processes.send(signal.SIGCONT, index)
    return True


class SuspendLong(Suspend):
  name = "SIGSTOP for longer than the heartbeat"
  codes = (1,)

  def seconds(self) -> float:
    return HEARTBEAT_SECONDS + 10


class FullDisk(Fault):
  """Files of one or both processes may not grow past some size."""

  name = "full disk"
  codes = (1,)
  starts = True

  def __post_init__(self):
    limit = {"file_bytes": int(2 ** self.rng.uniform(8, 16))}
    self.conditions = self.rng.choice([(limit, limit), (limit, {}), ({}, limit)])


class ClockJump(Fault):
  name = "clock jumps by up to a day"
  starts = True

  def __post_init__(self):
    first, second = (
      {"clock": self.rng.choice([-1, 1]) * self.rng.uniform(60, 86400), "after": self.rng.uniform(0, 30)}
      for _ in range(2)
    )
    self.conditions = self.rng.choice([(first, first), (first, {}), ({}, first), (first, second)])


class SlowStorage(Fault):
  name = "slow storage"
  starts = True

  def __post_init__(self):
    slow = {"delay": self.rng.uniform(0.001, 0.02), "seed": self.rng.randrange(1000)}
    self.conditions = self.rng.choice([(slow, slow), (slow, {}), ({}, slow)])


class FlipBit(Fault):
  """A flipped bit in one of several files."""

  starts = True

  def files(self, site: Site) -> list[Path]:
    raise NotImplementedError

  def happen(self, site: Site, processes: Processes | None) -> bool:
    del processes
    if files := [path for path in self.files(site) if path.stat().st_size]:
      flip_bit(self.rng.choice(files), self.rng)
    return bool(files)


class FlipCheckpoint(FlipBit):
  name = "flipped bit in the newest checkpoint"

  def files(self, site: Site) -> list[Path]:
    """Returns the newest checkpoint's files; none if there is no older checkpoint to resume from."""
    *older, newest = site.checkpoints or [site.workdir]
    return sorted(path for path in newest.rglob("*") if path.is_file()) if older else []


class FlipCache(FlipBit):
  name = "flipped bits in caches of latents and prompts"

  def files(self, site: Site) -> list[Path]:
    return site.cached

  def happen(self, site: Site, processes: Processes | None) -> bool:
    return all(super(FlipCache, self).happen(site, processes) for _ in range(self.rng.randint(1, 4)))


class FlipProgram(FlipBit):
  name = "flipped bit in the compilation cache"

  def files(self, site: Site) -> list[Path]:
    return sorted(site.programs.glob("*-cache"))


class FlipBase(FlipBit):
  name = "flipped bit in the base, restored"
  codes = (1,)

  def files(self, site: Site) -> list[Path]:
    return sorted(path for path in (site.base / "transformer").rglob("*") if path.is_file())

  def happen(self, site: Site, processes: Processes | None) -> bool:
    shutil.copytree(site.base, site.base.with_suffix(".copy"))
    return super().happen(site, processes)

  def undo(self, site: Site) -> None:
    shutil.rmtree(site.base)
    site.base.with_suffix(".copy").rename(site.base)


class Vanish(Fault):
  """A clip is missing until the command has ended."""

  name = "a clip vanishes, and comes back"
  codes = (1,)
  starts = True

  def happen(self, site: Site, processes: Processes | None) -> bool:
    if not site.checkpoints:  # a run that has not started yet may start on other data
      return False
    self.clip = self.rng.choice(site.clips)
    self.clip.rename(self.clip.with_suffix(".away"))
    return True

  def undo(self, site: Site) -> None:
    self.clip.with_suffix(".away").rename(self.clip)


class Change(Vanish):
  name = "a clip changes, and changes back"

  def happen(self, site: Site, processes: Processes | None) -> bool:
    if super().happen(site, processes):
      shutil.copy(self.clip.with_suffix(".away"), self.clip)
      write_noise(self.clip, self.rng.randrange(1000))
      return True
    return False


class ChangeWhileRunning(Change):
  """Also damages the cache, so that the clips are needed again."""

  name = "a clip changes and caches are damaged while it runs"
  codes = (0, 1)
  starts = False

  def happen(self, site: Site, processes: Processes | None) -> bool:
    is_possible = super().happen(site, processes)
    if is_possible:
      for path in site.cached:
        flip_bit(path, self.rng)
    return is_possible


FAULTS: tuple[Callable[[random.Random], Fault], ...] = (
  KillOne,
  KillBoth,
  TerminateOne,
  TerminateBoth,
  Suspend,
  SuspendLong,
  FullDisk,
  ClockJump,
  SlowStorage,
  FlipCheckpoint,
  FlipCache,
  FlipProgram,
  FlipBase,
  Vanish,
  Change,
  ChangeWhileRunning,
)


def flip_bit(path: Path, rng: random.Random) -> None:
  contents = bytearray(path.read_bytes())
  contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
  path.write_bytes(contents)


def write_noise(path: Path, seed: int) -> None:
  path.unlink(missing_ok=True)
  write_clip(path, np.random.default_rng(seed).integers(0, 256, (1, *SIZE, 3), np.uint8))


def write_pairs(folder: Path) -> None:
  """Writes the data of the run: pairs of images."""
  for number in range(2 * NUM_PAIRS):
    path = folder / "task" / f"pair_{number // 2}" / ("source.png" if number % 2 else "target.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_noise(path, number)
