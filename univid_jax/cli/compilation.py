"""JAX's persistent compilation cache, in which damaged programs are compiled again.

JAX itself warns about an entry that it cannot read, compiles the program at every start and never replaces the entry.
With its compression by zstandard, which it uses if that is installed, a flipped bit may even become part of a program.
There is no public interface to change that: this module uses JAX's private ones, and
tests/test_compilation.py fails if they change.
"""

import importlib.util
import logging
import os

import xxhash

from univid_jax.core.paths import CACHE_FOLDER

log = logging.getLogger(__name__)

# Packages that JAX finds accelerators by.
ACCELERATOR_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
# What an entry ends in: this word and the checksum of what precedes it. Decompression ignores both, so that entries are
# shared with other users of JAX.
_WORD = b"xxh3_128"


def enable_compilation_cache() -> None:
  """Keeps compiled programs for the next start; call before anything is compiled.

  JAX's own variables win: JAX_COMPILATION_CACHE_DIR (default here: ~/.cache/univid_jax/programs, which may be deleted
  at any time) and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS (default here: 0.5).
  """
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(CACHE_FOLDER), "programs"))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  _verify_entries()


def hide_false_alarms() -> None:
  """Hides errors that XLA logs whenever a CPU loads a compiled program; call before JAX is imported.

  XLA compares the features of the processor with LLVM's tuning options, such as +prefer-no-gather, which no processor
  reports, and warns of SIGILL. TF_CPP_MIN_LOG_LEVEL wins if it is set. With the plugin of an accelerator, whose errors
  matter, XLA's log stays as it is.
  """
  if not any(map(importlib.util.find_spec, ACCELERATOR_PLUGINS)):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _verify_entries() -> None:
  """Makes JAX read and write entries with checksums."""
  from jax._src import compilation_cache, lru_cache

  def read_intact(entry: bytes) -> bytes | None:
    """Returns an entry without its checksum; None if it is damaged."""
    value, word, digest = entry[:-24], entry[-24:-16], entry[-16:]
    if word == _WORD:
      return value if xxhash.xxh3_128_digest(value) == digest else None
    try:  # an entry of another program, or one that was cut off
      compilation_cache.decompress_executable(entry)
    except Exception:  # of zlib or zstandard
      return None
    return entry

  class VerifiedCache(lru_cache.LRUCache):
    def get(self, key: str) -> bytes | None:
      entry = super().get(key)
      value = None if entry is None else read_intact(entry)
      if entry is not None and value is None:
        path = self.path / f"{key}-cache"
        log.info("a program in the compilation cache is damaged and is compiled again: %s", path)
        path.unlink(missing_ok=True)
      return value

    def put(self, key: str, value: bytes) -> None:
      try:
        super().put(key, value + _WORD + xxhash.xxh3_128_digest(value))
      except OSError as error:  # a full disk, for example: the program still runs
        log.warning("a compiled program is not kept for the next start: %s", error)

  setattr(compilation_cache, "LRUCache", VerifiedCache)  # noqa: B010 (for the type checker, modules are read-only)
