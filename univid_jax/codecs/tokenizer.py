"""Wan2.1's tokenizer: cleans prompts and splits them into UMT5's tokens."""

import hashlib
import html
import logging
import os
import re
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int

from univid_jax.core.errors import UserError
from univid_jax.core.paths import exists, read_bytes

log = logging.getLogger(__name__)

# Maximum characters that a warning shows of the text that is left out.
_SHOWN = 60


def clean(text: str) -> str:
  """Repairs Unicode, resolves HTML entities (twice: they may be nested) and collapses white space, as Wan2.1 does."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
  """Converts text to token ids.

  Args:
    path: the checkpoint's tokenizer.json.
    max_length: the maximum number of tokens, end-of-text token included; longer texts are truncated, with a warning.

  Attributes:
    sha256: of the file.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a tokenizer.
  """

  def __init__(self, path: str | os.PathLike, *, max_length: int = 512):
    if not exists(path):
      raise FileNotFoundError(f"no such tokenizer: {path}")
    contents = read_bytes(path)
    self.sha256 = hashlib.sha256(contents).hexdigest()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(contents.decode())
    except Exception as error:  # the library raises nothing more specific
      raise UserError(f"not a tokenizer: {path} ({error})") from error
    self.max_length = max_length
    self._truncated: set[str] = set()
    self._tokenizer.no_padding()
    self._tokenizer.enable_truncation(max_length)

  def __call__(self, text: str) -> Int[np.ndarray, "n"]:
    """Returns token ids, int32, with the end-of-text token, without padding."""
    text = clean(text)
    encoding = self._tokenizer.encode(text)
    if encoding.overflowing and text not in self._truncated:
      self._truncated.add(text)
      self._report(text, encoding.overflowing)
    return np.array(encoding.ids, np.int32)

  def _report(self, text: str, overflowing: Sequence[tokenizers.Encoding]) -> None:
    """Warns of what was left out of a text."""
    pieces = [piece for part in overflowing for piece in zip(part.offsets, part.special_tokens_mask)]
    starts = [start for (start, _), is_special in pieces if not is_special]
    rest = text[starts[0] :].strip()
    shown = rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN]}..."
    message = "a prompt has more than the %d tokens that the model reads: the last %d are left out, from %r on"
    log.warning(message, self.max_length, len(starts), shown)
