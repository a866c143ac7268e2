"""What all commands share: flags, and one clear line for whatever is wrong with what they were given."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(Exception):
  """Something that the person at the keyboard can mend; its message says what."""


def run(main: Callable[..., None], *, num_arguments: int = 0) -> None:
  """Parses the flags, runs a command and exits: 0 done, 1 failed, 2 wrong flags, 130 interrupted.

  The command gets the words that are not flags, as many as `num_arguments` at most. Errors of values and files end in one
  line on stderr; with `--verbosity=1` the traceback precedes it.
  """
  logging.set_verbosity(logging.ERROR)
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow other words
  app.run(lambda argv: _guarded(main, argv, num_arguments), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
  try:
    return flags.FLAGS(list(argv))
  except flags.Error as error:
    # A config file that fails is reported with its traceback; the reason stands last.
    _complain(UserError(str(error).strip().splitlines()[-1]))
  except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    _complain(error)
  except SystemExit:
    # How absl ends --help, with a code that says failure.
    sys.exit(0)
  sys.exit(2)


def _guarded(main: Callable[..., None], argv: Sequence[str], num_arguments: int) -> None:
  arguments = argv[1:]
  if len(arguments) > num_arguments:
    _complain(UserError(f"unexpected argument {arguments[num_arguments]!r}; options look like --name=value"))
    sys.exit(2)
  try:
    main(*arguments)
  except (UserError, ValueError, OSError, ImportError) as error:
    if flags.FLAGS.verbosity >= 1:
      traceback.print_exc()
    _complain(error)
    _exit(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    _exit(130)
  except Exception as error:
    if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
      raise
    reason = (str(error).splitlines() or [""])[0]
    _complain(UserError(f"there is not enough memory ({reason or 'MemoryError'}): fewer frames, a smaller size or more devices "
                        "need less; python -m univid_jax.forecast says how much"))
    _exit(1)
  _exit(0)


def _complain(error: BaseException) -> None:
  message = error.args[0] if isinstance(error, (KeyError, AttributeError)) and error.args else error
  if isinstance(error, OSError) and error.strerror:
    message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  print(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def _exit(code: int) -> None:
  """Ends the process without waiting for threads that read data ahead."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
