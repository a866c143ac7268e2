"""Wan2.1's reading of prompts: cleaned, then cut into UMT5's tokens."""

import html
import os
import re

import ftfy
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int


def clean(text: str) -> str:
  """Mends broken Unicode, resolves HTML entities (twice, as they come nested) and folds white space, as the original does."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
  """Text to tokens.

  Args:
    path: the checkpoint's own tokenizer.json.
    max_length: tokens at most, the end-of-text token among them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a tokenizer.
  """

  def __init__(self, path: str | os.PathLike, *, max_length: int = 512):
    if not epath.Path(path).exists():
      raise FileNotFoundError(f"no such tokenizer: {path}")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
    except Exception as error:  # the library raises nothing more special
      raise ValueError(f"not a tokenizer: {path} ({error})") from error
    self.max_length = max_length
    self._tokenizer.no_padding()
    self._tokenizer.enable_truncation(max_length)

  def __call__(self, text: str) -> Int[np.ndarray, "n"]:
    """Token ids, int32, with the end-of-text token, without padding."""
    return np.array(self._tokenizer.encode(clean(text)).ids, np.int32)
