"""What the data of a run consists of, so that a run notices when it is resumed on other data."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json, write_json
from univid_jax.core.paths import read_bytes
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.text import count_noun, list_first

FILE = "data.json"

# Larger sources are compared as a whole, without naming what changed.
MAX_NAMED_RECORDS = 20_000
NAMED_CHANGES = 5
# Begins the names of sources that are not trained on.
HELD_OUT = "held-out "
# What a run was trained on before its data was changed, by checksum.
EARLIER = "trained on earlier"

log = logging.getLogger(__name__)


@runtime_checkable
class IdentifiesRecords(Protocol):
  """A source whose sentences are made from records that may change."""

  def identify_records(self) -> Mapping[str, object]:
    """Returns what identifies each record, by its name: the contents of its files and everything else it says."""
    ...


def fingerprint(
  sources: Mapping[str, SentenceSource], held_out: Mapping[str, SentenceSource] | None = None
) -> dict[str, Any]:
  """Returns for each source the number of its records, a checksum of all and, if there are not too many, of each.

  Args:
    sources: to train on.
    held_out: further ones, which get the prefix `HELD_OUT`.

  Raises:
    OSError, UserError: a file has vanished or changed.
  """
  found = {}
  for name, source in {**sources, **{HELD_OUT + name: source for name, source in (held_out or {}).items()}}.items():
    identities = source.identify_records() if isinstance(source, IdentifiesRecords) else {}
    records = {record: _digest(identity) for record, identity in sorted(identities.items())}
    found[name] = {
      "num_records": len(records),
      "checksum": _digest(list(records.items())),
      "records": records if len(records) <= MAX_NAMED_RECORDS else {},
    }
  return found


def remember_trained(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a fingerprint with what was trained on by an earlier one, and is not any more."""
  left = sorted(_trained_digests(before) - _trained_digests(now))
  if not left:
    return dict(now)
  return {**now, EARLIER: {"num_records": len(left), "checksum": _digest(left), "records": dict(zip(left, left))}}


def _trained_digests(fingerprint: Mapping[str, Any]) -> set[str]:
  sources = (source for name, source in fingerprint.items() if not name.startswith(HELD_OUT))
  return {digest for source in sources for digest in source["records"].values()}


def find_shared(training: Mapping[str, Any], held_out: Mapping[str, Any]) -> list[str]:
  """Returns the held-out records that are trained on, whatever they are called.

  Records are equal if all that identifies them is: of pairs the two files, of lines of a table also prompt and task.
  Of sources beyond `MAX_NAMED_RECORDS` nothing is known.

  Args:
    training: a fingerprint, of which what is held out is not looked at.
    held_out: a fingerprint, of which nothing else is looked at.
  """
  trained = _trained_digests(training)
  return [
    record
    for name, source in held_out.items()
    if name.startswith(HELD_OUT)
    for record, digest in source["records"].items()
    if digest in trained
  ]


def check_not_trained(workdir: epath.PathLike, held_out: Mapping[str, SentenceSource], *, allowed: bool) -> None:
  """Checks that a run has not been trained on what it is evaluated on, as far as WORKDIR/data.json names records.

  Args:
    workdir: of the run.
    held_out: what it is evaluated on.
    allowed: log records that it was trained on, instead of raising.

  Raises:
    UserError: it was trained on some.
  """
  trained, now = read_fingerprint(workdir), fingerprint({}, held_out)
  if not trained or not (shared := find_shared(trained, now)):
    return
  count = sum(source["num_records"] for source in now.values())
  text = f"{workdir} was trained on {len(shared)} of {count_noun(count, 'record')} to evaluate on, such as {shared[0]}"
  if not allowed:
    raise UserError(
      f"{text}: the data or config.data.held_out are others than in training; restore them, evaluate on other data "
      "with --config.data.test_pairs or test_folder, or go on with --config.data.allow_changed=True"
    )
  log.warning("%s", text)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Describes in one line per source what differs between two fingerprints.

  Held-out records count if `before` has any: those of version 0.1 have not.
  """
  changes = []
  knows_held_out = any(name.startswith(HELD_OUT) for name in before)
  for name in sorted(before.keys() | now.keys()):
    if name == EARLIER or (name.startswith(HELD_OUT) and not knows_held_out):
      continue
    old, new = before.get(name), now.get(name)
    if not old or not new:
      changes.append(f"{name} was {'removed' if old else 'added'}")
    elif old["checksum"] != new["checksum"]:
      parts = [f"{name} had {old['num_records']} records and has {new['num_records']}"]
      for verb, records in (
        ("removed", old["records"].keys() - new["records"].keys()),
        ("added", new["records"].keys() - old["records"].keys()),
        ("changed", {key for key, value in old["records"].items() if new["records"].get(key, value) != value}),
      ):
        if records and old["records"] and new["records"]:
          parts.append(f"{verb}: {list_first(sorted(records), NAMED_CHANGES)}")
      changes.append("; ".join(parts))
  return changes


def read_fingerprint(workdir: epath.PathLike) -> dict[str, Any] | None:
  """Reads WORKDIR/data.json; None if there is none.

  Raises:
    UserError: it is damaged.
  """
  path = epath.Path(workdir) / FILE
  try:
    values = parse_json(read_bytes(path))
    for source in values.values():
      if not (isinstance(source["num_records"], int) and isinstance(source["records"], dict) and source["checksum"]):
        raise ValueError("num_records must be a number, and records an object")
  except FileNotFoundError:
    return None
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged, so nothing says whether the data of the run has changed: restore it, or delete it to go on "
      f"with the data as it is now ({type(error).__name__}: {error})"
    ) from error
  return values


def write_fingerprint(workdir: epath.PathLike, values: Mapping[str, Any]) -> None:
  """Writes WORKDIR/data.json."""
  write_json(epath.Path(workdir) / FILE, values)


def _digest(identity: object) -> str:
  return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
