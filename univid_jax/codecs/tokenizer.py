"""Wan2.1's tokenizer: cleans prompts and splits them into UMT5's tokens."""

import html
import os
import re

import ftfy
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from univid_jax.core.errors import UserError


def clean(text: str) -> str:
  """Repairs Unicode, resolves HTML entities (twice: they may be nested) and collapses white space, as Wan2.1 does."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
  """Text to token ids.

  Args:
    path: the checkpoint's tokenizer.json.
    max_length: the maximal number of tokens, end-of-text token included; longer texts are truncated.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a tokenizer.
  """

  def __init__(self, path: str | os.PathLike, *, max_length: int = 512):
    if not epath.Path(path).exists():
      raise FileNotFoundError(f"no such tokenizer: {path}")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
    except Exception as error:  # the library raises nothing more specific
      raise UserError(f"not a tokenizer: {path} ({error})") from error
    self.max_length = max_length
    self._tokenizer.no_padding()
    self._tokenizer.enable_truncation(max_length)

  def __call__(self, text: str) -> Int[np.ndarray, "n"]:
    """Returns token ids, int32, with the end-of-text token, without padding."""
    return np.array(self._tokenizer.encode(clean(text)).ids, np.int32)
