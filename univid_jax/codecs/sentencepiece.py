"""SentencePiece models (spiece.model), converted to tokenizers.

The schema is the part that is needed of SentencePiece's sentencepiece_model.proto (Apache-2.0).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from tokenizers import models, normalizers, pre_tokenizers, processors

from univid_jax.core.errors import UserError

# Fields by message: name, number, type and default; "*" marks repeated fields, a capitalised type is a message.
_SCHEMA = {
  "Piece": [("text", 1, "string", ""), ("score", 2, "float", "0"), ("type", 3, "int32", "1")],
  "Trainer": [("model_type", 3, "int32", "1"), ("byte_fallback", 35, "bool", "false"), ("unk_id", 40, "int32", "0")],
  "Normalizer": [("precompiled_charsmap", 2, "bytes", "")],
  "Model": [("pieces", 1, "Piece*", ""), ("trainer_spec", 2, "Trainer", ""), ("normalizer_spec", 3, "Normalizer", "")],
}
_UNIGRAM = 1

# Types of pieces that are never split out of other text: unknown, control (</s> and the like), and the user's own.
_SPECIAL, _USER_DEFINED = (2, 3), 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnigramModel:
  """The contents of a Unigram model of SentencePiece.

  Attributes:
    pieces: text, score and type of each token.
    unknown: the id of the token for unknown text.
    byte_fallback: whether unknown characters become tokens of their bytes.
    charsmap: the compiled normalisation of characters, b"" for none.
  """

  pieces: Sequence[tuple[str, float, int]]
  unknown: int
  byte_fallback: bool
  charsmap: bytes

  @classmethod
  def parse(cls, model: bytes) -> "UnigramModel":
    """Parses the contents of a spiece.model; raises UserError if it is not one, or not of the kind Unigram."""
    parsed = _message_class()()
    try:
      parsed.ParseFromString(model)
      pieces = [(piece.text, piece.score, piece.type) for piece in parsed.pieces]
    except (message.DecodeError, UnicodeDecodeError) as error:
      raise UserError(f"not a SentencePiece model ({error})") from error
    if not pieces or parsed.trainer_spec.model_type != _UNIGRAM:
      raise UserError("not a SentencePiece model of the kind Unigram")
    return cls(
      pieces=pieces,
      unknown=parsed.trainer_spec.unk_id,
      byte_fallback=parsed.trainer_spec.byte_fallback,
      charsmap=parsed.normalizer_spec.precompiled_charsmap,
    )

  @classmethod
  def from_gguf(cls, values: Mapping[str, Any]) -> "UnigramModel | None":
    """Returns the model in the header of a GGUF file (`checkpoints.gguf_files`), None if there is none."""
    if values.get("tokenizer.ggml.model") != "t5":
      return None
    try:
      texts, scores, types = (values[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
      pieces = [(str(text), float(score), int(kind)) for text, score, kind in zip(texts, scores, types, strict=True)]
      charsmap = values.get("tokenizer.ggml.precompiled_charsmap", b"")
      unknown = int(values["tokenizer.ggml.unknown_token_id"])
    except (KeyError, ValueError, TypeError) as error:
      raise UserError(f"the tokenizer in the header is damaged ({error!r})") from error
    # SentencePiece's own flag is not in the header; llama.cpp falls back to bytes if the vocabulary has them.
    return cls(
      pieces=pieces, unknown=unknown, byte_fallback=any(kind == 6 for *_, kind in pieces), charsmap=bytes(charsmap)
    )

  def to_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns the tokenizer, which ends texts with </s> as T5's does.

    Raises:
      UserError: the model is inconsistent.
    """
    vocabulary = [(text, score) for text, score, _ in self.pieces]
    if "</s>" not in {text for text, _ in vocabulary}:
      raise UserError("the SentencePiece model has no </s>, which ends the prompts of T5")
    try:
      tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, self.unknown, self.byte_fallback))
      # The map turns all white space into spaces; SentencePiece then strips and collapses them.
      tokenizer.normalizer = normalizers.Precompiled(self.charsmap) if self.charsmap else normalizers.Sequence([])
      tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
      )
      tokenizer.add_special_tokens([_token(text) for text, _, kind in self.pieces if kind in _SPECIAL])
      tokenizer.add_tokens([_token(text) for text, _, kind in self.pieces if kind == _USER_DEFINED])
      end = tokenizer.token_to_id("</s>")
      tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    except Exception as error:  # the library raises nothing more specific
      raise UserError(f"the SentencePiece model is inconsistent ({error})") from error
    return tokenizer


def _token(text: str) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(text, normalized=False)


@functools.cache
def _message_class() -> Callable[[], Any]:
  """Builds the class of `Model` in `_SCHEMA`; type checkers cannot know its fields."""
  file = descriptor_pb2.FileDescriptorProto(name="model.proto", syntax="proto2")
  for name, fields in _SCHEMA.items():
    target = file.message_type.add(name=name)
    for field, number, kind, default in fields:
      base = kind.removesuffix("*")
      target.field.add(
        name=field,
        number=number,
        label=3 if kind.endswith("*") else 1,  # repeated, optional
        type=11 if base in _SCHEMA else getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{base.upper()}"),
        type_name=base if base in _SCHEMA else None,
        default_value=default or None,
      )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))
