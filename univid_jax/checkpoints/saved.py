"""The finished checkpoints of a run: which exist, which are intact, and what they hold."""

import json
import logging
import math
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from univid_jax.checkpoints.checksums import DamagedError, find_damage, has_checksums, verified, write_checksums
from univid_jax.checkpoints.orbax_files import METRICS_FILE
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.options import OnDamaged
from univid_jax.core.paths import atomic_write, bucket_errors, exists, is_remote, make_absolute, read_bytes, walk_files
from univid_jax.runtime.processes import count_distinct, sum_over_processes, wait_for_processes

CHECKPOINTS_FOLDER = "checkpoints"
# Suffix of a checkpoint that was set aside because it is damaged.
DAMAGED_SUFFIX = ".damaged"
# Checkpoints are moved here, next to the others, to be deleted, so that a kill leaves none half deleted under its name.
DELETED_FOLDER = "deleted"

T = TypeVar("T")

log = logging.getLogger(__name__)

# Up to this size, what sampling does not read (the optimizer's state) is verified, too: this takes no time, and a bit
# flipped anywhere means that the disk cannot be trusted.
_QUICK_BYTES = 1 << 30


class SavedCheckpoints:
  """The finished checkpoints of a run, by step.

  Args:
    workdir: of the run.
    model_only: whether only the model will be read, not the rest that training needs.
    verify: whether checkpoints are verified before they are used.
    on_damaged: what to do if the newest checkpoint is damaged.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    model_only: bool = False,
    verify: bool = True,
    on_damaged: OnDamaged = OnDamaged.FALLBACK,
  ):
    self.workdir, self.parent = workdir, make_absolute(workdir) / CHECKPOINTS_FOLDER
    self._model_only, self._verify, self._on_damaged = model_only, verify, on_damaged

  @property
  def steps(self) -> list[int]:
    """The steps of all finished checkpoints, ascending."""
    with bucket_errors(self.parent):
      return sorted(ocp.utils.checkpoint_steps(self.parent)) if exists(self.parent) else []

  def folder(self, step: int) -> epath.Path:
    return self.parent / str(step)

  def find_best(self) -> int | None:
    """Returns the step with the lowest validation loss; None if none was measured.

    Raises:
      DamagedError: a loss cannot be read.
    """
    losses = {step: loss for step in self.steps if (loss := self.val_loss(step)) is not None}
    return min(losses, key=lambda step: (losses[step], -step), default=None)

  def val_loss(self, step: int) -> float | None:
    """Reads the validation loss of a checkpoint; returns None if it was not measured or is not finite."""
    folder = self.folder(step)
    with verified(folder, enabled=self._verify and has_checksums(folder), select=_is_about_checkpoint):
      if not exists(file := folder / METRICS_FILE):
        return None
      contents = read_bytes(file)
      try:
        loss = float(parse_json(contents)["val_loss"])
      except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(folder, [f"{METRICS_FILE} (no validation loss)"]) from error
    return loss if math.isfinite(loss) else None

  def write_val_loss(self, step: int, val_loss: float) -> None:
    """Writes the validation loss of a checkpoint as Orbax does, unless it is not finite; one process may call it.

    Raises:
      OSError: it cannot be written.
    """
    if not math.isfinite(val_loss):
      return
    with atomic_write(self.folder(step) / METRICS_FILE) as path, path.open("w") as file:
      file.write(json.dumps({"val_loss": val_loss}))
      file.flush()
      os.fsync(file.fileno())  # an empty file would count as damage after a power failure

  def renew_checksums(self, step: int) -> None:
    """Renews the checksums of a checkpoint that has some, after `write_val_loss`; one process may call it.

    If another file is damaged, they stay unchanged, or the damage would be hidden.

    Raises:
      OSError: they cannot be written.
    """
    folder = self.folder(step)
    if not has_checksums(folder):
      return
    if damage := find_damage(folder, lambda name: name != METRICS_FILE):
      log.warning("%s", DamagedError(folder, damage).summary)
      return
    write_checksums(folder)

  def read(self, step: int | str | None, read: Callable[[epath.Path], T]) -> tuple[int, T]:
    """Reads a checkpoint while it is verified; all processes of a run must call it.

    Args:
      step: its number, "best" for the lowest validation loss, or None for the newest that is intact.
      read: reads what is needed from the checkpoint's folder, without waiting for other processes. A UserError that it
        raises counts as damage, unless the checksums are right; but if the error's root cause is itself a UserError,
        that one is raised.

    Returns:
      The number of the step, the same for all processes, and what `read` returned.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      UserError: `step` is neither a number nor "best", the processes find different checkpoints, or the checkpoint
        cannot be read although it is intact.
      DamagedError: the checkpoint is damaged for one of the processes or, if `step` is None, all checkpoints are.
    """
    if step is not None:
      found = self._find(step)
      return found, self._read(found, read)
    damaged: list[DamagedError] = []
    for found in reversed(self.agree_on_steps()):
      try:
        value = self._read(found, read)
      except DamagedError as error:
        if self._on_damaged == OnDamaged.STOP:
          advice = "--on_damaged_checkpoint=fallback uses the newest that is intact"
          raise DamagedError(error.folder, error.damage, advice) from error
        damaged.append(error)
        continue
      for error in damaged:
        log.warning("%s; the checkpoint of step %d is used instead", error.summary, found)
      return found, value
    if not damaged:
      raise FileNotFoundError(f"no finished checkpoint in {self.workdir}")
    advice = "no older checkpoint is intact: restore one from a copy, or train in another --workdir"
    raise DamagedError(damaged[0].folder, damaged[0].damage, advice) from damaged[0]

  def agree_on_steps(self) -> list[int]:
    """Returns the steps of all finished checkpoints, ascending; all processes of a run must call it.

    Raises:
      UserError: the processes find different checkpoints.
    """
    steps = self.steps
    self._agree(steps, f"steps {steps}")
    return steps

  def _agree(self, found: object, description: str) -> None:
    if count_distinct([repr(found)]) > 1:
      raise UserError(
        f"the processes find different checkpoints in {self.workdir} (this one: {description}): the workdir must be "
        "the same folder for all; if a run is writing to it, rerun the command"
      )

  def _find(self, step: int | str) -> int:
    """Returns the number of a requested step, the same for all processes."""
    try:
      found = self._find_alone(step)
    except (FileNotFoundError, UserError) as error:
      self._agree("none", "not the requested one")
      raise error
    self._agree(found, f"step {found}")
    return found

  def _find_alone(self, step: int | str) -> int:
    if step == "best":
      best = self.find_best()
      if best is None:
        raise FileNotFoundError(f"no finished checkpoint with a validation loss in {self.workdir}")
      return best
    if isinstance(step, str) and not step.isdecimal():
      raise UserError(f'the step of a checkpoint must be a number or "best", got {step!r}')
    if int(step) not in self.steps:
      existing = ", ".join(map(str, self.steps)) or "none"
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.workdir}; there are {existing}")
    return int(step)

  def _read(self, step: int, read: Callable[[epath.Path], T]) -> T:
    """Reads a checkpoint in every process; damage in one of them counts for all."""
    folder = self.folder(step)
    try:
      value = self._read_alone(folder, read)
    except Exception as error:  # any type, or the other processes would wait for this one
      num_damaged, _ = _count_failed(error)
      if num_damaged and not isinstance(error, DamagedError):
        raise DamagedError(folder, [_ELSEWHERE]) from error
      raise
    num_damaged, num_failed = _count_failed(None)
    if num_failed:
      del value  # makes room for an older checkpoint's
      if num_damaged:
        raise DamagedError(folder, [_ELSEWHERE])
      raise UserError(f"the checkpoint {folder} cannot be read by another process, which says why")
    return value

  def _read_alone(self, folder: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Reads a checkpoint while this process hashes its share of the files."""
    is_known, select = self._verify and has_checksums(folder), self._choose_files(folder)
    try:
      with verified(folder, enabled=self._verify, select=lambda name: select(name) and _is_own_share(name)):
        return read(folder)
    except UserError as error:
      if isinstance(error, DamagedError):
        raise
      first = _first_cause(error)
      if isinstance(first, UserError):
        raise first from None
      if is_known:
        raise
      raise DamagedError(folder, [str(error)]) from error

  def _choose_files(self, folder: epath.Path) -> Callable[[str], bool]:
    if not self._model_only or _size(folder / "training") <= _QUICK_BYTES:
      return lambda name: True
    return lambda name: not name.startswith("training/")

  def delete_outdated(self) -> None:
    """Deletes the checkpoints that Orbax has moved to DELETED_FOLDER; one process may call it at a time.

    Does nothing in a bucket, where Orbax moves nothing.
    """
    folder = self.parent / DELETED_FOLDER
    if is_remote(folder):
      return
    try:
      folder.rmtree(missing_ok=True)
    except OSError as error:
      log.warning("cannot delete the outdated checkpoints in %s: %s", folder, error.strerror or error)

  def set_aside_damaged(self, used: int) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again; all processes of a run must call it.

    Args:
      used: step of the checkpoint that `read` has read: newer ones are damaged. Older ones are renamed if their damage
        would keep Orbax from listing the others.
    """
    if jax.process_index() == 0:
      for step in self.steps:
        if step > used or not self._can_be_listed(step):
          self._set_aside(self.folder(step))
    wait_for_processes("damaged checkpoints are set aside")

  def _set_aside(self, folder: epath.Path) -> None:
    target, number = folder.with_name(f"{folder.name}{DAMAGED_SUFFIX}"), 1
    while target.exists():
      number += 1
      target = folder.with_name(f"{folder.name}{DAMAGED_SUFFIX}-{number}")
    folder.rename(target)
    log.warning("%s is kept as %s; delete it when you do not need it any more", folder, target.name)

  def _can_be_listed(self, step: int) -> bool:
    try:
      self.val_loss(step)
    except DamagedError as error:
      log.warning("%s", error.summary)
      return False
    return True


# The damage that is reported for a checkpoint that is damaged for another process.
_ELSEWHERE = "another process says where"


def _count_failed(error: Exception | None) -> tuple[int, int]:
  """Returns how many processes found a checkpoint damaged, and how many failed to read it; all must call it."""
  return sum_over_processes(isinstance(error, DamagedError)), sum_over_processes(error is not None)


def _first_cause(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def _is_about_checkpoint(name: str) -> bool:
  """Returns whether Orbax reads a file to list checkpoints."""
  return name.startswith("metrics/") or "/" not in name


def _is_own_share(name: str) -> bool:
  return sum(name.encode()) % jax.process_count() == jax.process_index()


def _size(folder: epath.Path) -> int:
  """Returns the size of all files in a folder, in bytes."""
  if not exists(folder):
    return 0
  with bucket_errors(folder):
    return sum(path.stat().length for path in walk_files(folder))
