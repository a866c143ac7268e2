"""Flags that belong together, for several commands."""

from typing import TYPE_CHECKING, Any

from univid_jax.core.options import OnDamaged

if TYPE_CHECKING:
  from univid_jax.cli.flags import CommandFlags


class ProcessFlags:
  """How the processes of one run find each other where JAX cannot tell; see `cli.distributed`."""

  def __init__(self, command: "CommandFlags"):
    self.coordinator = command.string("coordinator", None, "HOST:PORT of process 0, for runs of several processes.")
    help_text = "Number of processes; together with --coordinator and --process_id."
    self.num_processes = command.integer("num_processes", None, help_text, lower_bound=1)
    self.process_id = command.integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
    help_text = "Seconds without a heartbeat after which a process counts as dead and the others end."
    self.heartbeat_seconds = command.integer("heartbeat_seconds", 60, help_text, lower_bound=5)

  @property
  def given(self) -> list[bool]:
    """Whether each of the flags that only work together is given."""
    return [flag.value is not None for flag in (self.coordinator, self.num_processes, self.process_id)]


class VerificationFlags:
  """Whether weights are verified."""

  def __init__(self, command: "CommandFlags"):
    help_text = "Compare weights with their checksums before they are used: on or off."
    self._verify_weights = command.choice("verify_weights", "on", ["on", "off"], help_text)

  @property
  def verify_weights(self) -> bool:
    return self._verify_weights.value == "on"


class RunVerificationFlags(VerificationFlags):
  """Also what a damaged checkpoint leads to, for commands that read those of runs."""

  def __init__(self, command: "CommandFlags"):
    super().__init__(command)
    help_text = "If the latest checkpoint is damaged: fallback uses the newest that is intact, stop is an error."
    self._on_damaged = command.choice("on_damaged_checkpoint", str(OnDamaged.FALLBACK), list(OnDamaged), help_text)

  @property
  def value(self) -> dict[str, Any]:
    """Keyword arguments of `load_pipeline` and others."""
    return {"verify_weights": self.verify_weights, "on_damaged_checkpoint": OnDamaged(self._on_damaged.value)}
