"""Tokens equal the original's."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import GOLDENS
from univid_jax.codecs.tokenizer import Tokenizer, clean

FILE = GOLDENS / "tiny_wan" / "google" / "umt5-xxl" / "tokenizer.json"


def test_tokens_equal_the_originals():
  tokenize, expected = Tokenizer(FILE), load_file(GOLDENS / "tiny_wan_expected" / "expected.safetensors")
  for index, prompt in enumerate(json.loads((GOLDENS / "tiny_wan_expected" / "expected.json").read_text())["prompts"]):
    ids = tokenize(prompt)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected[f"prompt{index}.ids"])


def test_truncation_keeps_the_end_of_text_token():
  tokenize = Tokenizer(FILE)
  ids = tokenize("word " * 2000)
  assert len(ids) == 512 and ids[-1] == tokenize("")[0]


def test_cleaning():
  assert clean("  a\n\tb &amp;amp; c \u00e2\u20ac\u201d d ") == "a b & c \u2014 d"


def test_invalid_and_missing_files(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="not a tokenizer"):
    Tokenizer(tmp_path / "tokenizer.json")
  with pytest.raises(FileNotFoundError, match="no such tokenizer"):
    Tokenizer(tmp_path / "missing.json")
