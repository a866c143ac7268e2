"""What all commands share: logging, exit codes, and one line for every error.

Exit codes:
  0    done, or --help
  1    an error
  2    wrong flags
  75   stopped by SIGTERM or a preemption; a command that can be continued has saved its state
  130  stopped by Ctrl-C

A user's error is one line. These are `UserError`, and of OSError those that name a file, those of a full disk, and
those that this package raises itself. Every other exception is a bug, or a failure of a library or of hardware: its
line names a log file with the traceback, in WORKDIR/logs/ if the command has a local workdir that can be written, else
in the temporary directory. `--verbosity=1` prints the traceback as well.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

import absl.logging
from tqdm import tqdm

import univid_jax
from univid_jax.cli.compilation import hide_false_alarms
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.errors import Interrupted, UserError, first_line
from univid_jax.core.paths import is_remote
from univid_jax.core.program import spell_commands
from univid_jax.runtime.supervisor import Supervisor

# Conditions of the machine that come without a file name.
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EFBIG)
LAST_SECONDS = 60
OUT_OF_MEMORY = "use fewer frames, a smaller size or more devices; python -m univid_jax.forecast prints what is needed"


@runtime_checkable
class Main(Protocol):
  """A command: takes a command line, program name first (default: sys.argv), and returns the exit code."""

  def __call__(self, argv: Sequence[str] | None = None, /) -> int: ...


def command(flags: CommandFlags, *, continues: bool = False) -> Callable[[Callable[[], None]], Main]:
  """Decorates the body of a command, which runs after the flags are parsed; its exceptions become exit codes.

  Args:
    flags: of the command.
    continues: whether a command that was stopped continues when it is rerun.
  """

  def decorate(body: Callable[[], None]) -> Main:
    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None, /) -> int:
      return _run(body, flags, argv, continues=continues)

    return main

  return decorate


def _run(body: Callable[[], None], flags: CommandFlags, given: Sequence[str] | None, *, continues: bool) -> int:
  argv = sys.argv if given is None else given
  _prepare_streams()
  hide_false_alarms()
  if {"--help", "-help", "-h"} & set(argv[1:]):
    print(flags.help())
    return 0
  try:
    flags.parse(argv)
  except UserError as error:
    print(f"error: {_message(error)}", file=sys.stderr)
    return 2
  if not hasattr(univid_jax, "__version__"):  # a namespace package: the folder of a clone, not the package in it
    print("error: univid_jax/ in this folder shadows the installed package: run from another folder", file=sys.stderr)
    return 1
  supervisor = Supervisor()
  supervisor.can_continue = continues
  try:
    with supervisor.listen(), _status_messages():
      body()
      supervisor.finish()
    return 0
  except (Exception, KeyboardInterrupt) as error:
    error = supervisor.find_cause(error, is_suspicious=_may_come_from_another_process(error))
    if flags.verbosity.value >= 1:
      traceback.print_exc()
    if not supervisor.claim_report():
      time.sleep(LAST_SECONDS)  # the supervisor ends the process at this moment
    return _end(error, supervisor, argv, flags.workdir_path)
  finally:
    # The interpreter takes a while to exit, and a signal must not change the exit code any more.
    supervisor.close(ignore_signals=given is None)


def _prepare_streams() -> None:
  """Makes all output printable: discards it if a stream is closed, and escapes names that are not UTF-8."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w", errors="ignore"))  # noqa: SIM115 (stays open)
    elif isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def _end(error: BaseException, supervisor: Supervisor, argv: Sequence[str], workdir: str | None) -> int:
  """Reports an error or an interruption, in one line, and leaves the other processes; returns the exit code."""
  if isinstance(error, KeyboardInterrupt):
    line, code = str(error) or "interrupted", error.exit_code if isinstance(error, Interrupted) else 130
    print(line, file=sys.stderr)
  else:
    line, code = _message(_explain(error, argv, workdir)), 2 if isinstance(error, UsageError) else 1
    print(f"error: {line}", file=sys.stderr)
  supervisor.leave(code, line)
  return code


def _may_come_from_another_process(error: BaseException) -> bool:
  if isinstance(error, KeyboardInterrupt) or "jax" not in sys.modules:
    return False
  from univid_jax.runtime.processes import may_come_from_another_process

  return may_come_from_another_process(error)


class _Handler(logging.Handler):
  """Writes plain lines to stderr, above progress bars."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(spell_commands(self.format(record)), file=sys.stderr)


@contextlib.contextmanager
def _status_messages() -> Iterator[None]:
  """Shows this package's status messages, and of libraries only errors, while a command runs."""
  absl.logging.set_verbosity(absl.logging.ERROR)
  root, package, handler = logging.getLogger(), logging.getLogger("univid_jax"), _Handler()
  levels, handlers = (root.level, package.level), (root.handlers, package.handlers)
  root.setLevel(logging.ERROR)
  root.handlers = root.handlers or [handler]
  package.setLevel(logging.INFO)
  # Not through the root logger: libraries may have configured it.
  package.handlers, package.propagate = [handler], False
  try:
    yield
  finally:
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    (root.handlers, package.handlers), package.propagate = handlers, True


def _explain(error: BaseException, argv: Sequence[str], workdir: str | None) -> object:
  """Returns the line for an exception; writes a log file if it is not the user's."""
  if isinstance(error, UserError) or (isinstance(error, OSError) and _is_users(error)):
    return error
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    return f"not enough memory ({_describe(error)}): {OUT_OF_MEMORY}"
  log = _write_log(error, argv, workdir)
  return f"internal error ({_describe(error)}); the traceback is in {log}"


def _is_users(error: OSError) -> bool:
  if error.filename or error.errno in MACHINE_ERRORS:
    return True
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  return (frame.f_globals.get("__package__") or "").partition(".")[0] == "univid_jax"


def _describe(error: BaseException) -> str:
  name = type(error).__name__
  return f"{name}: {first_line(error)}" if str(error).strip() else name


def _write_log(error: BaseException, argv: Sequence[str], workdir: str | None) -> Path:
  """Writes what a bug report needs; returns the path of the file."""
  versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint", "grain", "numpy")]
  lines = [
    f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(argv)}",
    f"univid_jax {univid_jax.__version__}, Python {platform.python_version()}, {platform.platform()}",
    ", ".join(versions),
    "",
    *traceback.format_exception(error),
  ]
  name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
  if workdir and not is_remote(workdir):
    path = Path(workdir).absolute() / "logs" / name
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
      return path
    except OSError:
      pass  # the workdir may be what is wrong
  path = Path(tempfile.gettempdir()) / f"univid_jax-{name}"
  path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
  return path


def _message(error: object) -> str:
  """Returns a message on one line."""
  message = error
  if isinstance(error, OSError) and error.strerror:
    message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  return spell_commands(" ".join(str(message).split()))
