"""Sentences become rows, and rows batches that can be had again."""

import jax
import numpy as np
import pytest

from univid_jax import build
from univid_jax.data.loader import make_loader
from univid_jax.data.packing import (
  RowShape,
  pack,
  pack_rows,
  patchify,
  segment_intervals,
  sentence_features,
  target_tokens,
  unpatchify,
)
from univid_jax.types import Role, Sentence

PATCH = (1, 2, 2)


def features(lengths, *, prompt_length=0, seed=0):
  rng = np.random.default_rng(seed)
  clips = tuple(rng.normal(size=(n, 4, 6, 3)).astype(np.float32) for n in lengths)
  sentence = Sentence(clips=clips, roles=(Role.CONTEXT,) * (len(clips) - 1) + (Role.TARGET,))
  embedding = rng.normal(size=(prompt_length, 5)).astype(np.float32)
  return clips, sentence_features(sentence, patch_size=PATCH, prompt_embedding=embedding, text_len=512, task_id=2, context_id=3)


def test_patches_are_ordered_like_the_weights():
  latents = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  tokens = patchify(latents, PATCH)
  assert tokens.shape == (2 * 2 * 3, 12)
  np.testing.assert_array_equal(tokens[4], latents[0, 2:4, 2:4].reshape(-1))
  np.testing.assert_array_equal(unpatchify(tokens, (2, 4, 6), PATCH), latents)
  with pytest.raises(ValueError, match="do not divide"):
    patchify(latents[:, :3], PATCH)


def test_features_of_a_sentence():
  clips, row = features((1, 2, 1, 2), prompt_length=7)
  np.testing.assert_array_equal(row["tokens"][:6], patchify(clips[0], PATCH))
  np.testing.assert_array_equal(row["positions"][:, 0], np.repeat(np.arange(6), 6))
  np.testing.assert_array_equal(row["positions"][:6, 1:], [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
  assert row["target_mask"].sum() == 12 and row["target_mask"][-12:].all()
  assert row["text"].shape == (8, 5) and np.all(row["text"][7] == 0)
  np.testing.assert_array_equal(row["text_counts"], [1] * 7 + [505])
  with pytest.raises(ValueError, match="longer than 512"):
    features((1, 1), prompt_length=513)


def test_a_row_of_two_sentences_and_padding():
  _, first = features((1, 1), prompt_length=2)
  _, second = features((1, 2), prompt_length=0, seed=1)
  row = pack([first, second], RowShape(num_tokens=40, num_text_tokens=6, num_slots=3))
  ids = row.segment_ids[0]
  np.testing.assert_array_equal(ids, [1] * 12 + [2] * 18 + [0] * 10)
  np.testing.assert_array_equal(np.unique(row.key_intervals[0][ids == 1], axis=0), [[0, 12]])
  np.testing.assert_array_equal(np.unique(row.key_intervals[0][ids == 2], axis=0), [[12, 30]])
  np.testing.assert_array_equal(np.unique(row.key_intervals[0][ids == 0], axis=0), [[0, 0]])
  np.testing.assert_array_equal(np.unique(row.text_intervals[0][ids == 2], axis=0), [[3, 4]])
  np.testing.assert_array_equal(row.text_counts[0], [1, 1, 510, 512, 0, 0])
  np.testing.assert_array_equal(row.modulation_ids[0][:30], [0] * 6 + [1] * 6 + [2] * 6 + [3] * 12)
  np.testing.assert_array_equal(row.task_ids[0], [2, 2, 0])
  with pytest.raises(ValueError, match="do not fit into a row of 20"):
    pack([first, second], RowShape(num_tokens=20, num_text_tokens=6, num_slots=3))


def test_packing_many_gives_each_its_own_targets():
  lengths = [(2, 2, 2, 2), (1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 1, 1), (1, 1, 2, 2), (1, 2, 1, 2)]
  made = [features(n, seed=i) for i, n in enumerate(lengths)]
  row, places = pack_rows([f for _, f in made], RowShape(num_tokens=72, num_text_tokens=4, num_slots=3))
  # 8 + 4, 6 + 6 and 6 + 4 latent frames of 6 tokens.
  assert len(row.tokens) == 3 and sorted(set(places)) == sorted(places)
  for (clips, _), place in zip(made, places):
    np.testing.assert_array_equal(target_tokens(row.tokens, row, place), patchify(clips[-1], PATCH))


def test_intervals_of_segments():
  out = segment_intervals(np.array([[2, 0, 1, 5]]), np.array([[1, 1, 2, 0]]))
  np.testing.assert_array_equal(out, [[[2, 3], [0, 0], [0, 2], [0, 0]]])


class TestLoader:
  def loader(self, config, **options):
    source = build.sentences(config, "train", seed=0)
    defaults = dict(row_shape=build.row_shape(config), rows_per_batch=4, seed=1, num_packing_bins=8)
    return make_loader([source], build.feature_maker(config, build.encoders(config, None)), **defaults | options)

  @pytest.mark.parametrize("limits, message", [
      (dict(num_tokens=10), r"has \d+ tokens, and config.rows.num_tokens = 10 is all"),
      (dict(num_targets=2), r"has \d+ targets, and config.rows.num_target_tokens = 2 is all"),
  ])
  def test_a_sentence_that_fits_no_row_is_named(self, tiny_config, limits, message):
    shape = RowShape(**dict(num_tokens=48, num_text_tokens=3, num_slots=3) | limits)
    with pytest.raises(ValueError, match=message):
      next(self.loader(tiny_config, row_shape=shape))

  def batches(self, loader, count):
    out = [next(loader) for _ in range(count)]
    loader.close()
    return out

  def assert_equal(self, a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y)

  def test_same_seed_same_batches_whatever_the_threads(self, tiny_config):
    one, four = (self.batches(self.loader(tiny_config, num_threads=n), 5) for n in (1, 4))
    self.assert_equal(one, four)
    other = self.batches(self.loader(tiny_config, seed=2), 1)
    assert not np.array_equal(one[0].tokens, other[0].tokens)

  @pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
  def test_goes_on_where_it_was(self, tiny_config, packing):
    loader = self.loader(tiny_config, packing=packing)
    for _ in range(3):
      next(loader)
    state = loader.get_state()
    expected = self.batches(loader, 4)
    again = self.loader(tiny_config, packing=packing)
    again.set_state(state)
    self.assert_equal(self.batches(again, 4), expected)

  def test_processes_share_the_sentences(self, tiny_config):
    tiny_config.data.num_sentences = 40

    class Named:
      """Each sentence carries its index instead of its pixels."""

      def __len__(self):
        return 40

      def __getitem__(self, index):
        return int(index)

    def index_features(index):
      _, row = features((1, 1))
      return row | {"tokens": np.full_like(row["tokens"], index)}

    index_features.names = tuple(features((1, 1))[1])
    seen = []
    for process in (0, 1):
      loader = make_loader([Named()], index_features, row_shape=RowShape(num_tokens=12, num_text_tokens=1, num_slots=1),
                           rows_per_batch=5, seed=0, process_index=process, process_count=2, num_packing_bins=5)
      seen += [int(row[0, 0]) for batch in self.batches(loader, 4) for row in batch.tokens]
    assert sorted(seen) == list(range(40))

  def test_every_row_is_made_of_whole_sentences(self, tiny_config):
    for batch in self.batches(self.loader(tiny_config), 4):
      for row in range(4):
        count = int(batch.segment_ids[row].max())
        assert (batch.task_ids[row] > 0).sum() == (batch.context_ids[row] > 0).sum() == count
        for segment in range(1, count + 1):
          where = np.flatnonzero(batch.segment_ids[row] == segment)
          assert np.array_equal(batch.key_intervals[row, where[0]], [where[0], where[-1] + 1])
          assert batch.positions[row, where[0], 0] == 0 and batch.target_mask[row, where[-1]]

  def test_a_sentence_longer_than_the_row_is_refused(self, tiny_config):
    tiny_config.rows.num_tokens = 16
    with pytest.raises(ValueError, match=r"context I has 32 tokens, config\.rows\.num_tokens is only 16"):
      build.check(tiny_config)


