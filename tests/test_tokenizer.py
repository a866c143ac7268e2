"""Tokens equal the original's."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.helpers import GOLDENS
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.codecs.sentencepiece import UnigramModel
from univid_jax.codecs.tokenizer import Tokenizer, clean
from univid_jax.core.errors import UserError
from univid_jax.models.clip import CLIPConfig
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import VARIANTS
from univid_jax.parallel.mesh import make_mesh

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


def test_truncation_is_reported_once_per_text(caplog):
  """With the number of tokens that are left out, and their beginning."""
  tokenize, words = Tokenizer(FILE, max_length=12), [f"w{number}" for number in range(40)]
  total = len(Tokenizer(FILE)(" ".join(words)))
  tokenize("short")
  kept = len(tokenize(" ".join(words)))
  tokenize(" ".join(words))
  (line,) = caplog.messages
  assert kept == 12
  start = "a prompt has more than the 12 tokens that the model reads: the last "
  assert line.startswith(f"{start}{total - 12} are left out, from '"), line
  rest = line.split("from '")[1].removesuffix("...' on")
  assert " ".join(words).find(rest) > 0 and len(Tokenizer(FILE)(" ".join(words).partition(rest)[0])) == 12
  tokenize(" ".join(reversed(words)))
  assert len(caplog.messages) == 2


def test_cleaning():
  assert clean("  a\n\tb &amp;amp; c \u00e2\u20ac\u201d d ") == "a b & c \u2014 d"


def test_invalid_and_missing_files(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="not a tokenizer"):
    Tokenizer(tmp_path / "tokenizer.json")
  with pytest.raises(FileNotFoundError, match="no such tokenizer"):
    Tokenizer(tmp_path / "missing.json")


def test_embeddings_are_identified_by_all_that_determines_them(tmp_path):
  """Of two tokenizers of one text encoder, those of the other are not used."""
  other = json.loads(FILE.read_text())
  other["added_tokens"][0]["lstrip"] = not other["added_tokens"][0]["lstrip"]
  (tmp_path / "other.json").write_text(json.dumps(other))

  def fingerprints(tokenizer=FILE, **config):
    configs = {
      "text_encoder": UMT5Config(**config),
      "image_encoder": CLIPConfig(**config),
      "transformer": dataclasses.replace(VARIANTS["wan2.1-i2v-14b-480p"], text_len=512),
    }
    checkpoint = SimpleNamespace(
      has=lambda component: True,
      config=lambda component: configs[component],
      checksum=lambda component: "the same",
      load=lambda component, **options: None,
      tokenizer_path=lambda: tokenizer,
    )
    encoders = PretrainedEncoders(checkpoint, make_mesh({}, jax.devices()[:1]))
    return encoders.prompt_fingerprint, encoders.image_fingerprint

  prompts, images = fingerprints()
  assert fingerprints() == (prompts, images)
  assert fingerprints(tmp_path / "other.json")[0] != prompts and fingerprints(tmp_path / "other.json")[1] == images
  assert fingerprints(eps=1e-3)[0] != prompts and fingerprints(eps=1e-3)[1] != images
  assert images == "clip the same bfloat16", "as in caches from before"


class TestSentencePiece:
  """A SentencePiece model gives the tokens of the tokenizer.json that was made from it, and those of SentencePiece."""

  MODEL = (FILE.parent / "spiece.model").read_bytes()

  @given(
    st.text() | st.text("abcdefgh [clip1]<s/>\u4e2d\u6587\U0001f600\u200b\u3000\ufb01\u00bd\u2581\t\n.,'", max_size=40)
  )
  def test_tokens(self, text):
    assert self.tokenizer().encode(text).ids == self.expected().encode(text).ids

  def test_tokens_of_the_library(self):
    library = pytest.importorskip("sentencepiece", reason="compares with it where it is installed")
    reference = library.SentencePieceProcessor(model_proto=self.MODEL)
    for text in ("a clip", " two  spaces ", "\u4e2d\u6587 \U0001f600", "\ufb01ne \u00bd \u3000 \u2581 x", ""):
      assert self.tokenizer().encode(text).ids == [*reference.encode(text), 1], text

  @pytest.mark.parametrize("model", [b"", b"no model", MODEL[:5000]])
  def test_damaged(self, model):
    with pytest.raises(UserError, match="SentencePiece model"):
      UnigramModel.parse(model)

  @pytest.mark.parametrize(
    "change, message",
    [
      ({"pieces": [("a", -1.0, 1), ("<unk>", 0.0, 2)]}, "has no </s>"),
      ({"unknown": 999}, "is inconsistent"),
      ({"charsmap": b"no map"}, "is inconsistent"),
    ],
  )
  def test_inconsistent(self, change, message):
    with pytest.raises(UserError, match=message):
      dataclasses.replace(UnigramModel.parse(self.MODEL), **change).to_tokenizer()

  def test_bytes_of_unknown_characters(self):
    """A model with pieces for bytes uses them, one by one."""
    model = UnigramModel.parse(self.MODEL)
    pieces = [*model.pieces, *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    tokens = dataclasses.replace(model, pieces=pieces, byte_fallback=True).to_tokenizer().encode("\u4e2d").tokens
    assert tokens[-4:] == ["<0xE4>", "<0xB8>", "<0xAD>", "</s>"]

  @staticmethod
  @functools.cache
  def tokenizer():
    return UnigramModel.parse(TestSentencePiece.MODEL).to_tokenizer()

  @staticmethod
  @functools.cache
  def expected():
    return tokenizers.Tokenizer.from_file(str(FILE))
