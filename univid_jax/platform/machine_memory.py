"""The memory of the machine that a process can still allocate."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
  """Returns the bytes that can be allocated without swapping, page cache that can be dropped included.

  On Linux that is MemAvailable, or what the process's control groups leave if that is less; None elsewhere.

  Args:
    root: root of the file system.
  """
  available = _read_table(root / "proc/meminfo").get("MemAvailable")
  if available is None:
    return None
  return max(0, min([available, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
  """Yields what is left in each control group (v1 or v2) of the process that has a limit."""
  groups = root / "sys/fs/cgroup"
  with contextlib.suppress(OSError):
    for line in (root / "proc/self/cgroup").read_text().splitlines():
      _, controllers, path = line.split(":", 2)
      if not controllers:  # version 2
        names, mount = ("memory.max", "memory.current", "inactive_file"), groups
      elif "memory" in controllers.split(","):
        names, mount = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), groups / "memory"
      else:
        continue
      folder = mount / path.lstrip("/")  # missing in containers that see their own group as the mount
      for parent in (folder, *folder.parents):
        if (left := _left_by_group(parent, *names)) is not None:
          yield left
        if parent == mount:
          break


def _left_by_group(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
  """Returns what a control group has left; None if it has no limit."""
  try:
    left = int((folder / limit).read_text()) - int((folder / used).read_text())
  except (OSError, ValueError):  # "max"
    return None
  return left + _read_table(folder / "memory.stat").get(reclaimable, 0)


def _read_table(path: Path) -> dict[str, int]:
  """Reads lines of a name and a number, in kB or bytes; returns bytes by name, {} if there is no such file."""
  table: dict[str, int] = {}
  with contextlib.suppress(OSError):
    for line in path.read_text().splitlines():
      match line.replace(":", " ").split():
        case [name, number]:
          table[name] = int(number)
        case [name, number, "kB"]:
          table[name] = 1024 * int(number)
  return table
