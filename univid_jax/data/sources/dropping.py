"""Names records that cannot be used, each in one line: names of files may contain line breaks."""

from univid_jax.data.sources.base import Dropped


def printable(name: str) -> str:
  """Returns a name with escapes, as in string literals, for what is no printable character."""
  return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def drop(record: str, error: Exception) -> Dropped:
  """Returns a record that an error made unusable; its name and the message are one line each."""
  return Dropped(printable(record), printable(str(error)))
