"""The weightless codec: inverse, causal, and good enough for the default run."""

import jax.numpy as jnp
import numpy as np
import pytest

from univid_jax.codecs.dct import DCTCodec
from univid_jax.core.pixels import to_uint8
from univid_jax.data.sources.computed import ComputedSentences
from univid_jax.data.sources.photos import PhotoSource
from univid_jax.evaluation.metrics.image import psnr


def clip(shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_image_with_all_channels_is_lossless():
  codec, image = DCTCodec(latent_channels=48), clip((1, 8, 12, 3))
  latents = codec.encode(image)
  assert latents.shape == (1, 2, 3, 48) and latents.dtype == np.float32
  np.testing.assert_allclose(codec.decode(latents), image, atol=1e-5)


@pytest.mark.parametrize("channels, stride", [(16, 4), (48, 4), (64, 8)])
def test_encoding_inverts_decoding(channels, stride):
  codec = DCTCodec(latent_channels=channels, spatial_stride=stride)
  latents = np.random.default_rng(0).normal(size=(3, 2, 3, channels)).astype(np.float32)
  video = codec.decode(latents)
  assert video.shape == (9, 2 * stride, 3 * stride, 3)
  np.testing.assert_allclose(codec.encode(video), latents, atol=1e-4)


def test_latents_of_a_still_video_equal_those_of_its_image():
  codec = DCTCodec()
  image = clip((1, 16, 16, 3))
  still = codec.encode(np.repeat(image, 5, axis=0))
  np.testing.assert_allclose(still[0], codec.encode(image)[0], atol=1e-6)
  same = np.isclose(still[1], still[0], atol=1e-5).all(axis=(0, 1))
  assert same.sum() >= 10 and np.allclose(still[1][..., ~same], 0, atol=1e-5)


def test_latents_depend_on_their_own_group_of_frames_only():
  codec = DCTCodec()
  video = clip((9, 8, 8, 3))
  changed = video.copy()
  changed[5:] = 0
  np.testing.assert_array_equal(codec.encode(changed)[:2], codec.encode(video)[:2])


def test_parts_are_the_clip():
  codec = DCTCodec()
  latents = np.random.default_rng(0).normal(size=(4, 2, 3, 16)).astype(np.float32)
  parts = list(codec.decode_parts(latents))
  assert [len(part) for part in parts] == [1, 4, 4, 4]
  np.testing.assert_allclose(np.concatenate(parts), codec.decode(latents), atol=1e-5)


def test_numpy_and_jax_agree():
  codec = DCTCodec()
  video = clip((5, 8, 8, 3))
  latents = codec.encode(video)
  np.testing.assert_allclose(codec.encode(jnp.asarray(video)), latents, atol=1e-5)
  np.testing.assert_allclose(codec.decode(jnp.asarray(latents)), codec.decode(latents), atol=1e-5)


@pytest.mark.parametrize(
  "shape, message",
  [
    ((4, 8, 8, 3), "4n \\+ 1 frames, got 4; the nearest are 1 and 5"),
    ((0, 8, 8, 3), "got 0; the nearest are 1"),
    ((5, 9, 8, 3), "height must be a multiple of 4, got 9; the nearest are 8 and 12"),
    ((5, 8, 3, 3), "width must be a multiple of 4, got 3; the nearest are 4"),
    ((5, 9, 3, 3), "height must be a multiple of 4, got 9; the nearest are 8 and 12; the width must be .*, got 3;"),
  ],
)
def test_invalid_shapes(shape, message):
  with pytest.raises(ValueError, match=message):
    DCTCodec().encode(np.zeros(shape, np.float32))


def test_quality_on_the_clips_of_the_default_run():
  from configs.video_tasks import get_config

  config = get_config()
  codec = DCTCodec(**config.codec)
  source = ComputedSentences(
    clips=[PhotoSource.bundled("held_out")],
    tasks=dict(config.data.tasks),
    seed=5,
    num_sentences=1000,
    num_frames=config.data.num_frames,
    size=(config.data.height, config.data.width),
  )
  scores = {1: [], 5: []}
  for i in range(100):
    for pixels in source[i].clips:
      scores[len(pixels)].append(
        psnr(to_uint8(codec.decode(codec.encode(pixels.astype(np.float32) / 127.5 - 1))), pixels)
      )
  assert np.mean(scores[1]) >= 35 and np.mean(scores[5]) >= 35
