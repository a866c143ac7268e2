"""Flags of the commands; those that several commands share are defined here, once."""

import functools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from univid_jax.cli.config_files import load_config
from univid_jax.cli.flag_errors import explain_flag
from univid_jax.cli.flag_groups import ProcessFlags, RunVerificationFlags, VerificationFlags
from univid_jax.cli.overrides import check_overrides, quote_lists
from univid_jax.cli.path_flags import define_path, define_paths, expand_config, expand_home
from univid_jax.config import presets
from univid_jax.config.boundary import from_config_dict, to_config_dict
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.core.paths import refuse_other_buckets
from univid_jax.core.program import spell_commands
from univid_jax.core.text import join_words
from univid_jax.diffusion.distillations import DISTILLATIONS

# Prints the keys of the config.
KEYS_HELP = (
  'All keys with the values of a preset: python -c "from univid_jax.config import presets; '
  "print(presets.get_config('PRESET'))\"; their meanings: python -m pydoc univid_jax.config.schema."
)


class UsageError(UserError):
  """A flag or argument that is wrong by itself or together with others; the exit code is 2."""


class CommandFlags:
  """The flags of one command.

  They live in a namespace of their own instead of `absl.flags.FLAGS`, so that the modules of several commands can be
  imported together, and importing one changes no global state. A command defines its flags with `string`, `strings`
  (separated by commas), `repeated`, `switch`, `integer`, `number` and `choice`, which are absl's `DEFINE_...`, with
  `path` and `paths`, in which ~ is expanded, and shared flags with the other methods.

  Args:
    usage: the text of --help above the flags.
    max_arguments: words besides the flags that the command takes, which are paths.

  Attributes:
    arguments: these words, after `parse`.
    argv: the whole command line, after `parse`.
  """

  def __init__(self, usage: str | None, *, max_arguments: int = 0):
    self._usage, self._max_arguments = usage or "", max_arguments
    self._values = flags.FlagValues()
    self._values.set_gnu_getopt(True)  # flags may follow arguments
    self._config: ConfigFlag | None = None
    self._workdir: WorkdirFlag | None = None
    self.arguments: Sequence[str] = ()
    self.argv: Sequence[str] = ()
    self._required: list[str] = []
    self.string = functools.partial(self._define, flags.DEFINE_string)
    self.strings = functools.partial(self._define, flags.DEFINE_list)
    self.path = functools.partial(self._define, define_path)
    self.paths = functools.partial(self._define, define_paths)
    self.repeated = functools.partial(flags.DEFINE_multi_string, flag_values=self._values)
    self.switch = functools.partial(flags.DEFINE_bool, flag_values=self._values)
    self.integer = functools.partial(flags.DEFINE_integer, flag_values=self._values)
    self.number = functools.partial(flags.DEFINE_float, flag_values=self._values)
    self.choice = functools.partial(flags.DEFINE_enum, flag_values=self._values)
    self.switch("help", False, "Print this text.", short_name="h")
    self.verbosity = self.integer("verbosity", 0, "1 also prints the traceback of an error.")

  def _define(self, define: Callable[..., Any], name: str, *arguments: Any, required: bool = False) -> Any:
    if required:
      self._required.append(name)
    return define(name, *arguments, required=required, flag_values=self._values)

  def config(self, *, of_run: bool = False) -> "ConfigFlag":
    self._config = ConfigFlag(of_run=of_run)
    return self._config

  def workdir(self, purpose: str) -> "WorkdirFlag":
    """Defines --workdir of a command that has --config."""
    assert self._config, "the default workdir depends on the config"
    help_text = f"{purpose}; default: runs/NAME of the config, as runs/tiny."
    self._workdir = WorkdirFlag(self.path("workdir", None, help_text), self._config)
    return self._workdir

  def checkpoint(self) -> flags.FlagHolder[str]:
    help_text = "A converted checkpoint, the workdir of a training run, or small, the base in the package."
    return self.path("checkpoint", None, help_text, required=True)

  def lora(self) -> flags.FlagHolder[list[str]]:
    help_text = "LoRA files or folders, separated by commas; PATH:WEIGHT sets a weight, high=PATH an expert."
    return self.paths("lora", [], help_text)

  def accelerate(self, beginning: str = "A") -> flags.FlagHolder[list[str]]:
    kinds = " or ".join(DISTILLATIONS)
    help_text = (
      f"{beginning} distillation LoRA next to the others, as PATH[:WEIGHT][:KIND], of the kind {kinds}. It sets "
      "the solver, steps, shift and guidance. high=PATH,low=PATH are those of two experts."
    )
    return self.paths("accelerate", [], help_text)

  def offload_inactive(self) -> flags.FlagHolder[bool]:
    help_text = "Keep only the expert that is in use in device memory, of a base with two."
    return self.switch("offload_inactive", False, help_text)

  def lora_skip_unmatched(self) -> flags.FlagHolder[bool]:
    return self.switch("lora_skip_unmatched", False, "Leave out tensors of a LoRA without a counterpart in the model.")

  def dtype(self) -> flags.FlagHolder[str | None]:
    help_text = "Dtype of the model; default: that of the run; of bases bfloat16, or float32 if trained from scratch."
    return self.choice("dtype", None, ["bfloat16", "float32"], help_text)

  def quantize(self) -> flags.FlagHolder[str | None]:
    help_text = "Storage of the blocks' linear weights; default: as the checkpoint or the run's base is stored."
    return self.choice("quantize", None, list(Quantize), help_text)

  def step(self) -> flags.FlagHolder[str | None]:
    return self.string("step", None, "Checkpoint of a workdir: a step, or best; default: the latest.")

  def verification(self) -> VerificationFlags:
    return VerificationFlags(self)

  def run_verification(self) -> RunVerificationFlags:
    return RunVerificationFlags(self)

  def profile(self, folder: str) -> flags.FlagHolder[int]:
    help_text = f"Write a JAX profiler trace of this many steps to {folder}."
    return self.integer("profile", 0, help_text, lower_bound=0)

  def processes(self) -> ProcessFlags:
    return ProcessFlags(self)

  @property
  def workdir_path(self) -> str | None:
    """The workdir of a command that has one."""
    return self._workdir.path if self._workdir else None

  def parse(self, argv: Sequence[str]) -> None:
    """Parses a command line, program name first; may be called again.

    Raises:
      UserError: a flag is unknown or has an invalid value, or a config file cannot be loaded.
    """
    self.argv = list(argv)
    if self._values.is_parsed():
      self._values.unparse_flags()
    for name in [name for name in self._values if name.startswith("config")]:
      delattr(self._values, name)
    try:
      rest = self._values.read_flags_from_files(list(argv), force_gnu=True)
      if self._config:
        rest = self._config.define(rest, self._values)
      self.arguments = list(map(expand_home, self._values(rest)[1:]))
    except flags.Error as error:
      if not isinstance(error, flags.UnrecognizedFlagError):  # whose mistyped name may be what is missing
        self._require(argv)
      raise UserError(explain_flag(error, self._names)) from error
    except UserError:
      raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
      raise UserError(f"wrong override of the config: {error}") from error
    if self._config:
      self._config.read(self._values)
    if len(self.arguments) > self._max_arguments:
      word = self.arguments[self._max_arguments]
      raise UsageError(f"unexpected argument {word!r}; flags are written --name=value")
    _ = self.workdir_path  # checks the config's name

  def _require(self, argv: Sequence[str]) -> None:
    """Raises UsageError if required flags are missing from a command line; absl names one at a time, by its value."""
    given = {word.lstrip("-").partition("=")[0] for word in argv[1:]}
    missing = [name for name in self._required if name not in given]
    if missing and "flagfile" not in given:
      raise UsageError(f"give {' and '.join(f'--{name}' for name in missing)}; see --help")

  @property
  def _names(self) -> list[str]:
    """The flags, without the keys of the config."""
    names = [name for name in self._values if len(name) > 1 and not name.startswith("config")]
    return sorted([*names, "config"] if self._config else names)

  @property
  def config_arguments(self) -> list[str]:
    """The arguments of the command line that describe the config, each as --NAME=VALUE."""
    given, words = [], iter(self.argv[1:])
    for word in words:
      name, equals, _ = word.partition("=")
      if name.lstrip("-").partition(".")[0] == "config":
        given.append(f"--{name.lstrip('-')}={word.partition('=')[2] if equals else next(words, '')}")
    return given

  @property
  def config_name(self) -> str:
    """What --config says; "" if it is not given."""
    return _take(self.argv, "config")[0] or ""

  @property
  def config_overrides(self) -> list[str]:
    """The keys of the config that the command line overrides."""
    return [x.removeprefix("--config.").partition("=")[0] for x in self.config_arguments if x.startswith("--config.")]

  def given(self, names: Sequence[str]) -> list[str]:
    """Returns those of the named flags that are on the command line, as arguments."""
    return [self._values[name].serialize() for name in names if self._values[name].present]

  def refuse(self, reason: str, names: Sequence[str]) -> None:
    """Raises UsageError with a reason if some of the named flags, which would have no effect, are not the default."""
    if found := [f"--{name}" for name in names if self._values[name].value != self._values[name].default]:
      raise UsageError(f"{reason}: leave out {join_words(found, 'and')}")

  def help(self) -> str:
    """Returns the text of --help."""
    return "\n".join([spell_commands(self._usage.strip()), "", "flags:", *self._describe_flags()])

  def _describe_flags(self) -> Iterator[str]:
    if self._config:
      text = f"A preset ({', '.join(presets.PRESETS)}), or a file with get_config(), as FILE.py[:ARGUMENT]."
      text += f" --config.KEY=VALUE overrides a value. Default: {self._config.default}. {KEYS_HELP}"
      yield from _describe("--config", text)
    defined = [name for name in self._values if name in self._names and name != "config"]
    for name in sorted(defined, key=lambda name: name in ("help", "verbosity")):  # as defined, these last
      flag = self._values[name]
      default = f" Default: {flag.default}." if flag.default and not isinstance(flag.default, list) else ""
      text = re.sub(r"\.?;\s+repeat this option to specify a list of values", ". It can be repeated.", flag.help)
      required = " (required)" if name in self._required else ""
      yield from _describe(f"--{'[no]' if flag.boolean else ''}{name}{required}", f"{text}{default}")


def _describe(name: str, text: str) -> list[str]:
  return [f"  {name}", *textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]


class ConfigFlag:
  """--config=NAME, and --config.KEY=VALUE for every key.

  Attributes:
    is_given: whether the command line has --config.

  Args:
    of_run: whether the default is the config of the run in --workdir, if there is one, and not a preset.
  """

  def __init__(self, *, of_run: bool = False):
    self._value: RunConfig | None = None
    self._of_run = of_run
    self.is_given = False

  @property
  def value(self) -> RunConfig:
    assert self._value, "flags are parsed when the command runs"
    return self._value

  @property
  def default(self) -> str:
    """What is used without --config, for --help."""
    return f"that of the run in --workdir, else {presets.DEFAULT}" if self._of_run else presets.DEFAULT

  def define(self, argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Defines flags for the overrides in a command line; returns the command line without --config."""
    name, rest = _take(argv, "config")
    self.is_given = name is not None
    config = self._load(name, rest)
    check_overrides(config, rest)
    rest = quote_lists(rest)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    return rest

  def _load(self, name: str | None, rest: Sequence[str]) -> ml_collections.ConfigDict:
    if name is None and self._of_run:
      from univid_jax.checkpoints.run import read_run

      workdir = expand_home(_take(rest, "workdir")[0] or _default_workdir(presets.DEFAULT))
      refuse_other_buckets(workdir, "workdirs")
      if (record := read_run(workdir)) is not None:
        return to_config_dict(record.config)
    return load_config(presets.DEFAULT if name is None else expand_home(name))

  def read(self, values: flags.FlagValues) -> None:
    config = values["config"].value
    assert isinstance(config, ml_collections.ConfigDict)
    self._value = expand_config(from_config_dict(config))


def _take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
  """Returns the value of a flag in a command line, None if it is not given, and the command line without it."""
  found, rest, words = None, [], iter(argv)
  for word in words:
    flag, equals, value = word.partition("=")
    if flag in (f"--{name}", f"-{name}"):
      found = value if equals else next(words, "")
    else:
      rest.append(word)
  return found, rest


class WorkdirFlag:
  """--workdir, by default runs/NAME with the name of the config."""

  def __init__(self, folder: flags.FlagHolder[str | None], config: ConfigFlag):
    self._folder, self._config = folder, config

  @property
  def path(self) -> str:
    """The folder, which may be in a bucket that cannot have one."""
    return self._folder.value or _default_workdir(self._config.value.name)

  @property
  def value(self) -> str:
    """The folder; raises UserError if it is neither local nor in gs://."""
    refuse_other_buckets(self.path, "workdirs")
    return self.path


def _default_workdir(name: str) -> str:
  """Returns the folder of a run whose config has this name.

  Raises:
    UserError: it would not be in runs/.
  """
  parts = PurePath(name).parts
  if not parts or PurePath(name).is_absolute() or ".." in parts:
    raise UserError(f"config.name = {name!r} names no folder in runs/: change it, or give --workdir")
  return f"runs/{name}"
