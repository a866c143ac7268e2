"""Packed rows, and the loader that makes batches of them."""

import dataclasses
import json
from contextlib import closing

import jax
import numpy as np
import pytest

from tests.helpers import CAUSAL
from tests.stand_ins import Shape
from univid_jax.checkpoints.run_parts import context_mode
from univid_jax.checkpoints.sentence_lengths import check_rows
from univid_jax.codecs.dct import DCTCodec
from univid_jax.codecs.encoders import PlainEncoders
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.options import Packing
from univid_jax.core.packed_row import UNIVID_CONTEXT
from univid_jax.core.sentence import Role, Sentence, reference_roles
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import make_loader
from univid_jax.data.rows.loader_options import LoaderOptions, RowOwnership
from univid_jax.data.rows.packing import RowShape, pack, pack_rows, segment_intervals, select_target_tokens
from univid_jax.data.rows.tokens import patchify, sentence_features, unpatchify
from univid_jax.data.sources.computed import open_computed

PATCH = (1, 2, 2)


def make_features(lengths, *, prompt_length=0, seed=0):
  """Returns random latents of these lengths, and their features."""
  rng = np.random.default_rng(seed)
  clips = tuple(rng.normal(size=(n, 4, 6, 3)).astype(np.float32) for n in lengths)
  sentence = Sentence(clips=clips, roles=(Role.CONTEXT,) * (len(clips) - 1) + (Role.TARGET,))
  embedding = rng.normal(size=(prompt_length, 5)).astype(np.float32)
  features = sentence_features(
    sentence, patch_size=PATCH, prompt_embedding=embedding, text_len=512, task_id=2, context_id=3
  )
  return clips, features


def test_patches_are_ordered_like_the_weights():
  latents = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  tokens = patchify(latents, PATCH)
  assert tokens.shape == (2 * 2 * 3, 12)
  np.testing.assert_array_equal(tokens[4], latents[0, 2:4, 2:4].reshape(-1))
  np.testing.assert_array_equal(unpatchify(tokens, (2, 4, 6), PATCH), latents)
  with pytest.raises(ValueError, match="do not divide"):
    patchify(latents[:, :3], PATCH)


def test_features_of_a_sentence():
  clips, features = make_features((1, 2, 1, 2), prompt_length=7)
  np.testing.assert_array_equal(features.tokens[:6], patchify(clips[0], PATCH))
  np.testing.assert_array_equal(features.positions[:, 0], np.repeat(np.arange(6), 6))
  np.testing.assert_array_equal(features.positions[:6, 1:], [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
  assert features.target_mask.sum() == 12 and features.target_mask[-12:].all()
  assert features.text.shape == (8, 5) and np.all(features.text[7] == 0)
  np.testing.assert_array_equal(features.text_counts, [1] * 7 + [505])
  with pytest.raises(UserError, match="longer than 512"):
    make_features((1, 1), prompt_length=513)


def test_a_row_of_two_sentences_and_padding():
  _, first = make_features((1, 1), prompt_length=2)
  _, second = make_features((1, 2), prompt_length=0, seed=1)
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
  with pytest.raises(UserError, match="do not fit into a row of 20"):
    pack([first, second], RowShape(num_tokens=20, num_text_tokens=6, num_slots=3))


@pytest.mark.parametrize(
  "limit, needed", [("num_tokens", 24), ("num_text_tokens", 8), ("num_slots", 2), ("num_targets", 12)]
)
def test_two_sentences_share_a_row_if_it_has_room_for_everything(limit, needed):
  """Each has 12 tokens, 6 of them targets, and 4 text tokens, one of which is the padding of the prompt."""
  sentences = [make_features((1, 1), prompt_length=3)[1]] * 2
  for capacity, num_rows in ((needed, 1), (needed - 1, 2)):
    shape = dataclasses.replace(RowShape(num_tokens=100, num_text_tokens=100, num_slots=100), **{limit: capacity})
    assert len(pack_rows(sentences, shape)[0].tokens) == num_rows


def test_every_sentence_of_a_row_has_its_image_features():
  features = make_features((1, 1))[1]
  images = [np.full((257, 2), number, np.float32) for number in (1, 2)]
  sentences = [dataclasses.replace(features, image_features=image) for image in images]
  row = pack(sentences, RowShape(num_tokens=30, num_text_tokens=2, num_slots=3))
  np.testing.assert_array_equal(row.image_features[0], np.concatenate([*images, np.zeros((257, 2))]))
  np.testing.assert_array_equal(row.image_intervals[0], [[0, 257]] * 12 + [[257, 514]] * 12 + [[0, 0]] * 6)


def test_packing_keeps_the_targets_of_every_sentence():
  lengths = [(2, 2, 2, 2), (1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 1, 1), (1, 1, 2, 2), (1, 2, 1, 2)]
  made = [make_features(n, seed=i) for i, n in enumerate(lengths)]
  shape = RowShape(num_tokens=72, num_text_tokens=4, num_slots=3)
  row, places = pack_rows([features for _, features in made], shape)
  # 8 + 4, 6 + 6 and 6 + 4 latent frames of 6 tokens.
  assert len(row.tokens) == 3 and sorted(set(places)) == sorted(places)
  for (clips, _), place in zip(made, places):
    np.testing.assert_array_equal(select_target_tokens(row.tokens, row, place), patchify(clips[-1], PATCH))


def test_intervals_of_segments():
  out = segment_intervals(np.array([[2, 0, 1, 5]]), np.array([[1, 1, 2, 0]]))
  np.testing.assert_array_equal(out, [[[2, 3], [0, 0], [0, 2], [0, 0]]])


def test_the_capacity_of_rows_follows_from_the_config(tiny_config):
  changes = {"rows.num_target_tokens": 20, "model.attention": "context_causal"}
  config = override(tiny_config, changes)
  assert RowShape.from_config(config.rows, context_mode(config)) == RowShape(
    num_tokens=48, num_text_tokens=3, num_slots=3, num_targets=20, context_mode=CAUSAL
  )
  assert RowShape.from_config(tiny_config.rows, UNIVID_CONTEXT).num_targets == 24


class NumberedSentences:
  """Sentences whose task is their index, from `first`."""

  task_names = ()

  def __init__(self, count, first=0):
    self.count, self.first = count, first

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    clip = np.zeros((1, 4, 6, 3), np.float32)
    return Sentence(clips=(clip, clip), roles=reference_roles(2), task=str(self.first + index))


class NumberFeatures:
  """Features of one size whose tokens have the sentence's index as their value."""

  shape = Shape()

  def __call__(self, sentence):
    features = make_features((1, 1))[1]
    return dataclasses.replace(features, tokens=np.full_like(features.tokens, int(sentence.task)))


class TestLoader:
  def loader(self, config, *, seed=1, row_shape=None, ownership=None, **options):
    source = open_computed(config, "train", seed=0)
    encoders = PlainEncoders(DCTCodec(**dataclasses.asdict(config.codec)), config.model.text_dim)
    features = FeatureMaker(encoders, shape=Shape(), task_names=source.task_names)
    return make_loader(
      [source],
      features,
      row_shape=row_shape or RowShape.from_config(config.rows, context_mode(config)),
      layout=BatchLayout(num_rows=4),
      seed=seed,
      ownership=ownership,
      options=LoaderOptions(num_packing_bins=8, **options),
    )

  def batches(self, loader, count):
    out = [next(loader) for _ in range(count)]
    loader.close()
    return out

  def assert_equal(self, a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y)

  @pytest.mark.parametrize(
    "limits, message",
    [
      (
        dict(num_tokens=10),
        r"has \d+ tokens, but a row holds only config.rows.num_tokens = 10; set config.rows.num_tokens to at least \d+",
      ),
      (dict(num_targets=2), r"has \d+ targets, but a row holds only config.rows.num_target_tokens = 2"),
    ],
  )
  def test_a_sentence_that_is_too_long_is_named(self, tiny_config, limits, message):
    shape = RowShape(**dict(num_tokens=48, num_text_tokens=3, num_slots=3) | limits)
    with closing(self.loader(tiny_config, row_shape=shape)) as loader, pytest.raises(UserError, match=message):
      next(loader)

  def test_batches_depend_on_the_seed_and_not_on_threads(self, tiny_config):
    one, four = (self.batches(self.loader(tiny_config, num_threads=n), 5) for n in (1, 4))
    self.assert_equal(one, four)
    other = self.batches(self.loader(tiny_config, seed=2), 1)
    assert not np.array_equal(one[0].tokens, other[0].tokens)

  @pytest.mark.parametrize("packing", Packing)
  def test_resumes_where_it_was(self, tiny_config, packing):
    loader = self.loader(tiny_config, packing=packing)
    for _ in range(3):
      next(loader)
    state = loader.get_state()
    expected = self.batches(loader, 4)
    again = self.loader(tiny_config, packing=packing)
    again.set_state([state])
    self.assert_equal(self.batches(again, 4), expected)

  def test_processes_share_the_sentences(self):
    seen = []
    for process in (0, 1):
      loader = make_loader(
        [NumberedSentences(40)],
        NumberFeatures(),
        row_shape=RowShape(num_tokens=12, num_text_tokens=1, num_slots=1),
        layout=BatchLayout(num_rows=10),
        seed=0,
        ownership=RowOwnership(own=range(5 * process, 5 * process + 5), order=range(10)),
        options=LoaderOptions(num_streams=2, num_packing_bins=5),
      )
      seen += [int(row[0, 0]) for batch in self.batches(loader, 4) for row in batch.tokens]
    assert sorted(seen) == list(range(40))

  def test_with_fixed_streams_batches_do_not_depend_on_processes(self, tiny_config):
    whole = self.batches(self.loader(tiny_config, num_streams=2), 3)
    halves = [
      self.batches(self.loader(tiny_config, num_streams=2, ownership=RowOwnership(own=rows, order=range(4))), 3)
      for rows in (range(2), range(2, 4))
    ]
    for batch, first, second in zip(whole, *halves):
      self.assert_equal(batch, jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second))
    with pytest.raises(UserError, match=r"config\.rows\.streams = 3 does not divide the 4 rows of a batch"):
      self.loader(tiny_config, num_streams=3)

  def numbered(self, process=0, count=1, streams=0, rows=6, sources=None, weights=None, **options):
    """Six rows of a batch on all processes, each of one sentence that is its number."""
    return make_loader(
      sources or [NumberedSentences(1000)],
      NumberFeatures(),
      row_shape=RowShape(num_tokens=12, num_text_tokens=1, num_slots=1),
      layout=BatchLayout(num_rows=rows),
      seed=0,
      weights=weights,
      ownership=RowOwnership(own=range(rows // count * process, rows // count * (process + 1)), order=range(rows)),
      options=LoaderOptions(num_packing_bins=5, num_streams=streams or count, **options),
    )

  def sentences(self, loaders, batches=3):
    """The sentences of each batch over all processes."""
    parts = [self.batches(loader, batches) for loader in loaders]
    return [[int(row[0, 0]) for part in parts for row in part[step].tokens] for step in range(batches)]

  @pytest.mark.parametrize(
    "saved, streams",
    [(3, 0), (2, 3), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 0), (2, 0), (1, 6), (3, 2)))],
  )
  def test_other_processes_continue_the_streams(self, saved, streams):
    """A run that was saved by one to three processes goes on with the same batches on one to six."""
    loaders = [self.numbered(process, saved, streams) for process in range(saved)]
    assert self.sentences(loaders) == self.sentences([self.numbered(streams=streams or saved)])
    loaders = [self.numbered(process, saved, streams) for process in range(saved)]
    for loader in loaders:
      next(loader)
    states = [loader.get_state() for loader in loaders]
    expected = self.sentences(loaders)
    for count in (1, 2, 3, 6):
      others = [self.numbered(process, count, streams) for process in range(count)]
      for loader in others:
        loader.set_state(states)
      assert self.sentences(others) == expected, count

  @pytest.mark.parametrize(
    "streams, weights",
    [
      (1, [0.4, 0.6]),
      (4, None),
      (8, [1.0, 3.0]),
      *(
        pytest.param(streams, weights, marks=pytest.mark.long)
        for streams in (1, 2, 4, 8)
        for weights in (None, [1.0, 3.0], [0.4, 0.6])
        if (streams, weights) not in [(1, [0.4, 0.6]), (4, None), (8, [1.0, 3.0])]
      ),
    ],
  )
  def test_every_stream_mixes_the_sources_by_their_weights(self, streams, weights):
    """Each row is a sentence: those of a row of the batch, hence of a stream, come from both sources."""
    sources = [NumberedSentences(40), NumberedSentences(1000, first=100)]
    batches = self.batches(self.numbered(streams=streams, rows=8, sources=sources, weights=weights), 40)
    is_first = np.array([batch.tokens[:, 0, 0] < 100 for batch in batches])
    share = weights[0] / sum(weights) if weights else 0.5
    of_streams = is_first.reshape(40, streams, -1).mean((0, 2))
    np.testing.assert_allclose(of_streams, share, atol=0.04)
    numbers = [int(number) for batch in batches for number in batch.tokens[:, 0, 0]]
    assert all(abs(numbers.count(number) - share * 320 / 40) <= 1 for number in range(40)), "each as often per epoch"
    if streams > 1 and weights is None:
      assert is_first.mean(1).min() > 0 and is_first.mean(1).max() < 1, "no batch is of one source"

  @pytest.mark.parametrize("packing", Packing)
  def test_a_batch_of_other_rows(self, caplog, packing):
    """Of another mesh, with per_batch = 0: it continues if its rows divide over the streams, and says so."""
    loader = self.numbered(streams=4, rows=8, packing=packing)
    next(loader)
    state = loader.get_state()
    loader.close()
    for rows in (4, 12, 24):
      other = self.numbered(streams=1, rows=rows, packing=packing)
      other.set_state([state])
      assert len(self.batches(other, 3)[-1].tokens) == rows
      assert caplog.messages[-1].startswith(f"batches have {rows} rows, 8 before: config.rows.per_batch = 0 makes ")
      assert caplog.messages[-1].endswith("the mesh or config.rows.microbatches has changed")
    message = r"microbatches = 2 rows of a batch, which the run's 4 streams do not divide; before it made 8"
    with closing(self.numbered(rows=2)) as other, pytest.raises(UserError, match=message):
      other.set_state([state])

  def test_positions_of_version_0_1_are_read(self):
    """It saved the state of Grain's iterator: of one stream, or of several that were mixed. No process is as far as
    another, so that their order matters."""

    def plain(loader):
      return list(json.loads(loader.get_state())["streams"].values())

    for processes, streams in ((1, 1), (2, 2), (1, 3), (2, 6)):
      loaders = [self.numbered(process, processes, streams) for process in range(processes)]
      for number, loader in enumerate(loaders):
        for _ in range(1 + number):
          next(loader)
      old = [{"parents": plain(x), "index": 6, "stop": False} if streams > processes else plain(x)[0] for x in loaders]
      expected, again = self.sentences(loaders), self.numbered()
      again.set_state([json.dumps(state).encode() for state in old])
      assert self.sentences([again]) == expected

  @pytest.mark.parametrize("state", [b"", b"{}", b"[]", b'{"num_streams": 2, "streams": {}}', b'{"num_streams": 1}'])
  def test_a_damaged_position_is_refused(self, state):
    with pytest.raises(UserError, match="the position in the data is damaged"):
      self.numbered().set_state([state])

  def test_mixed_sources_do_not_depend_on_threads(self):
    def batches(num_threads):
      loader = make_loader(
        [NumberedSentences(40), NumberedSentences(7)],
        NumberFeatures(),
        row_shape=RowShape(num_tokens=36, num_text_tokens=3, num_slots=3),
        layout=BatchLayout(num_rows=2),
        seed=1,
        weights=[2.0, 1.0],
        options=LoaderOptions(num_threads=num_threads),
      )
      return self.batches(loader, 6)

    self.assert_equal(batches(1), batches(4))

  def test_rows_consist_of_whole_sentences(self, tiny_config):
    for batch in self.batches(self.loader(tiny_config), 4):
      for row in range(4):
        count = int(batch.segment_ids[row].max())
        assert (batch.task_ids[row] > 0).sum() == (batch.context_ids[row] > 0).sum() == count
        for segment in range(1, count + 1):
          where = np.flatnonzero(batch.segment_ids[row] == segment)
          assert np.array_equal(batch.key_intervals[row, where[0]], [where[0], where[-1] + 1])
          assert batch.positions[row, where[0], 0] == 0 and batch.target_mask[row, where[-1]]

  def test_rows_that_are_too_short_are_rejected(self, tiny_config):
    config = override(tiny_config, {"rows.num_tokens": 16})
    with pytest.raises(UserError, match=r"context I has 32 tokens, config\.rows\.num_tokens is only 16"):
      check_rows(config)
