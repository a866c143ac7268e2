"""Lengths of a config's sentences in tokens, and whether they fit into its rows."""

import math

from univid_jax.checkpoints.run_parts import patch_strides
from univid_jax.config.boundary import override
from univid_jax.config.drawn import DrawnSentences
from univid_jax.config.schema import RunConfig
from univid_jax.core.contexts import CONTEXTS, video_pattern
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.text import size_text


def clip_tokens(config: RunConfig) -> int:
  """Returns the number of tokens of a clip of a config, at the largest of its sizes.

  Raises:
    UserError: clips do not divide into patches; the message names the nearest valid sizes.
  """
  (temporal_stride, spatial_stride), longest = patch_strides(config), 0
  for height, width in config.data.sizes:
    clip = (config.data.num_frames, height, width)
    try:
      tokens = latent_shape(clip, temporal_stride=temporal_stride, spatial_stride=spatial_stride)
    except UserError as error:
      size = f"{size_text((height, width))} pixels (width x height)"
      raise UserError(f"config.data has clips of {size}: {error}") from error
    longest = max(longest, math.prod(tokens))
  return longest


def longest_sentence(config: RunConfig) -> tuple[int, str, int]:
  """Returns the number of tokens, context and number of clips of the longest sentence that a config draws.

  Records that list their clips may be longer: they count as four clips of any context, and ARC's as four images.

  Raises:
    UserError: clips do not divide into patches; the message names the nearest valid sizes.
  """
  clip = {True: clip_tokens(config), False: clip_tokens(override(config, {"data.num_frames": 1}))}
  drawn = DrawnSentences.from_config(config.data)
  listed = [(context, 4) for context in CONTEXTS] if drawn.lists_contexts or not drawn.kinds else []

  def count_tokens(context: str, count: int) -> int:
    first, second, *query = (clip[is_video] for is_video in video_pattern(context, num_clips=4))
    return (count // 2 - 1) * (first + second) + sum(query)

  return max((count_tokens(context, count), context, count) for context, count in (*drawn.kinds, *listed))


def check_rows(config: RunConfig) -> None:
  """Checks that clips divide into patches, and that the longest sentence that the config draws fits into a row.

  Raises:
    UserError: they do not; the message names the nearest valid sizes, or the tokens needed.
  """
  tokens, context, count = longest_sentence(config)
  if tokens > config.rows.num_tokens:
    raise UserError(
      f"a sentence of {count} clips of context {context} has {tokens} tokens, config.rows.num_tokens is only "
      f"{config.rows.num_tokens}"
    )
