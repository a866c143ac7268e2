"""Exceptions with a meaning for the commands: errors that a user can fix, and runs that were stopped."""

import contextlib
import re
from collections.abc import Iterator


class UserError(ValueError):
  """A wrong value, file or combination that the user can fix; the message says what, where and how.

  The commands end in this message alone, without a traceback. In Python it is a ValueError like any other.

  Args:
    message: becomes one line, since names and values in files may contain line breaks.
  """

  def __init__(self, message: str):
    super().__init__(" ".join(message.splitlines()))


class DivergedError(UserError, FloatingPointError):
  """The loss or the gradient is not finite, or too many steps in a row were skipped."""


class Interrupted(KeyboardInterrupt):
  """The command has to end: after a signal, with everything saved, or because another process of its run has ended.

  Like KeyboardInterrupt it may be raised anywhere in the main thread, and `except Exception` does not catch it.

  Attributes:
    exit_code: of the command: 75 after SIGTERM or a preemption (EX_TEMPFAIL: rerun later), 130 after Ctrl-C, 1 after a
      failure.
  """

  def __init__(self, message: str, exit_code: int = 75):
    super().__init__(message)
    self.exit_code = exit_code


@contextlib.contextmanager
def name_key(key: str) -> Iterator[None]:
  """Names a config key in errors about the file or folder that it points to, unless they name one already.

  Args:
    key: without "config.".
  """
  try:
    yield
  except (UserError, OSError) as error:  # edited in place: callers may handle its type and number
    if not re.search(r"(?<![\w./])config\.([a-z_]+\.[a-z_]|init_from)", str(error)):
      if isinstance(error, OSError) and error.strerror:
        error.strerror = f"config.{key}: {error.strerror}"
      else:
        error.args = (f"config.{key}: {error}",)
    raise


def first_line(error: BaseException) -> str:
  """Returns the first line of an exception's message, or its repr if it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else repr(error)
