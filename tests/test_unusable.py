"""Records that cannot be used: found by `prepare`, and left out or named when they become unusable later."""

import dataclasses
import errno
import json
import os
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest

from tests.clip_files import write_image, write_pairs, write_table, write_tfds, write_video
from tests.stand_ins import Bucket, CountingEncoders, Shape, open_bucket
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.config.schema import RunConfig
from univid_jax.core import bucket_files
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Role, Sentence, read_frames
from univid_jax.data import usable
from univid_jax.data.cache.entries import CacheError
from univid_jax.data.features import FeatureCaches, FeatureMaker
from univid_jax.data.prepare import prepare
from univid_jax.data.rows import loader
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import Loader, TooLongError, make_loader
from univid_jax.data.rows.loader_options import LoaderOptions, RowOwnership
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources import base
from univid_jax.data.sources.folder import FolderSource
from univid_jax.data.sources.open import DataSources, open_data
from univid_jax.data.usable import read_usable
from univid_jax.evaluation.score import Scorer
from univid_jax.evaluation.sentences import plan_sentences
from univid_jax.training import validation
from univid_jax.training.setup import set_up_run
from univid_jax.training.validation import select_sentences

CASES = Path(__file__).parent / "cases" / "videos"
CORRUPT, PLAIN = CASES / "corrupt.mp4", CASES / "plain.mp4"
ROWS = RowShape(num_tokens=400, num_text_tokens=8, num_slots=2)
KINDS = ("metadata", "pairs", "manifest", "folder")
CHANGES = {"data.height": 16, "data.width": 24, "data.held_out": 0.0, "data.num_sentences": 12, "data.bundled": False}


def place_video(video: Path, target: Path, kind: str) -> None:
  """Copies a video; for a table without its last two of 50 frames, so that it can be four clips of equal length."""
  if kind != "metadata":
    shutil.copy(video, target)
    return
  with av.open(str(video)) as source, av.open(str(target), "w") as copy:
    stream = copy.add_stream_from_template(source.streams.video[0])
    frame = round(1 / (source.streams.video[0].average_rate * source.streams.video[0].time_base))
    for packet in source.demux(video=0):
      if packet.dts is not None and packet.pts < 48 * frame:
        packet.stream = stream
        copy.mux(packet)


def write_data(folder: Path, kind: str, video: Path) -> tuple[RunConfig, Path]:
  """Writes a data set with a copy of a video in one of its records.

  Returns:
    The config, and the path of the copy.
  """
  folder.mkdir()
  copy = folder / "bad.mp4"
  if kind == "metadata":
    write_video(folder / "good.mp4", 24)
    write_table(folder, [("good.mp4", "x"), ("bad.mp4", "x")])
  elif kind == "pairs":
    for name in ("a", "b", "c"):
      pair = folder / "edges" / name
      pair.mkdir(parents=True)
      for side in ("source", "target"):
        shutil.copy(PLAIN, pair / f"{side}.mp4")
    copy = folder / "edges" / "b" / "target.mp4"
    (folder / "edges" / ".DS_Store").mkdir()
  elif kind == "manifest":
    write_image(folder / "good.png")
    lines = [[{"path": name}, {"path": "good.png", "role": "target"}] for name in ("good.png", "bad.mp4")]
    (folder / "m.jsonl").write_text("\n".join(json.dumps({"clips": clips}) for clips in lines))
  else:
    for name in ("a", "c", "d", "e", "f"):
      write_image(folder / f"{name}.png", size=(64, 96))
  place_video(video, copy, kind)
  path = folder / "m.jsonl" if kind == "manifest" else folder
  return override(tiny(), CHANGES | {f"data.{kind}": str(path)}), copy


RECORDS = {
  "metadata": r"metadata\.csv line 3 \(bad\.mp4\)",
  "pairs": r"edges/[abc] with the examples",
  "manifest": r"m\.jsonl line 2",
  "folder": r"(computed )?sentence \d+|bad\.mp4",
}


def open_loader(data: DataSources, features: FeatureMaker, *, allow_dropped: bool) -> Loader:
  """Opens batches of two rows."""
  return make_loader(
    list(data.sources.values()),
    features,
    row_shape=ROWS,
    layout=BatchLayout(num_rows=2),
    seed=0,
    options=LoaderOptions(allow_dropped=allow_dropped),
  )


def make_features(config: RunConfig, data: DataSources, workdir: Path | None) -> FeatureMaker:
  encoders = CountingEncoders()
  caches = FeatureCaches.open(override(config, {"init_from": "base"}), encoders, workdir) if workdir else None
  return FeatureMaker(encoders, shape=Shape(), task_names=data.task_names, caches=caches)


@pytest.mark.parametrize("has_base", [False, True], ids=["without a base", "with a base"])
@pytest.mark.parametrize("kind", KINDS)
def test_prepare_finds_damaged_frames(tmp_path, caplog, kind, has_base):
  """Also in files whose headers are intact."""
  config, path = write_data(tmp_path / "data", kind, CORRUPT)
  if has_base:
    config = override(config, {"init_from": "base"})
  data = open_data(config)
  assert not data.dropped
  features = make_features(config, data, tmp_path if has_base else None)
  message = (
    rf"listed records? cannot be used(:|, the first is) ({RECORDS[kind]}).*{path.name}: frame \d+ (cannot|is damaged)"
  )
  with pytest.raises(UserError, match=message):
    prepare(features, data, row_shape=ROWS)
  caplog.clear()
  done = prepare(features, data, row_shape=ROWS, allow_dropped=True)
  assert done.dropped and all(path.name in each.reason for each in done.dropped)
  assert len(caplog.messages) == len(done.dropped)


def test_a_file_that_vanishes_stops_no_others(tmp_path):
  """Where the key of a clip is a hash of its file."""
  config, path = write_data(tmp_path / "data", "metadata", PLAIN)
  data = open_data(override(config, {"init_from": "base"}))
  path.unlink()
  done = prepare(make_features(config, data, tmp_path), data, row_shape=ROWS, allow_dropped=True)
  assert done.dropped and all("bad.mp4" in each.reason for each in done.dropped) and done.num_encoded


def test_damaged_held_out_pairs_are_left_out_of_validation_and_evaluation(tmp_path, caplog):
  config, _ = write_data(tmp_path / "data", "pairs", PLAIN)
  write_data(tmp_path / "test", "pairs", CORRUPT)
  config = override(config, {"data.test_pairs": str(tmp_path / "test"), "eval.sentences_per_case": 3})
  data = open_data(config)
  with pytest.raises(UserError, match=r"target\.mp4: frame \d+"):
    [read_frames(clip) for sentence in select_sentences(data, config) for clip in sentence.clips]
  config = override(config, {"data.allow_dropped": True})
  planned = [sentence.read() for sentence in plan_sentences(config, data.held_out)]
  for sentences in (select_sentences(data, config), planned):
    assert sentences and all(len(read_frames(clip)) for sentence in sentences for clip in sentence.clips)
  assert any("dropped: edges/b" in message for message in caplog.messages)
  for path in (tmp_path / "test").rglob("target.mp4"):
    shutil.copy(CORRUPT, path)
    path.write_bytes(path.read_bytes()[:2000])
  with pytest.raises(UserError, match=r"none of the \d+ held-out sentences can be read"):
    select_sentences(data, config)


def test_training_sentences_to_validate_on_are_named_as_such(tmp_path, caplog):
  """Nothing is held out."""
  config, _ = write_data(tmp_path / "data", "pairs", PLAIN)
  config = override(config, {"data.allow_dropped": True})
  data = open_data(config)
  assert not data.held_out
  for target in (tmp_path / "data").rglob("target.mp4"):
    shutil.copy(CORRUPT, target)
    target.write_bytes(target.read_bytes()[:2000])
  with pytest.raises(UserError, match=r"none of the \d+ training sentences can be read"):
    select_sentences(data, config)
  assert "dropped" in caplog.text and "held-out" not in caplog.text


def test_what_another_process_cannot_read_is_left_out_here(monkeypatch):
  """Or processes would validate on different sentences."""
  monkeypatch.setattr(usable, "sum_over_processes", lambda failed: failed + next(elsewhere))
  sentences = [Sentence(clips=(np.zeros((1, 2, 2, 3), np.uint8),), roles=(Role.TARGET,)) for _ in range(3)]
  elsewhere = iter([0, 1, 0])
  found = read_usable([lambda s=s: s for s in sentences], "held-out", allow_dropped=True)
  assert [id(sentence) for sentence in found] == [id(sentences[0]), id(sentences[2])]


def test_what_another_process_cannot_encode_is_left_out_here(tmp_path, monkeypatch, caplog):
  config, _ = write_data(tmp_path / "data", "pairs", PLAIN)
  data = open_data(config)
  sentences = [data.sources["pairs"][index] for index in range(3)]
  features, elsewhere = make_features(config, data, None), iter([0, 1, 0])
  monkeypatch.setattr(validation, "sum_over_processes", lambda failed: failed + next(elsewhere))
  found = validation.leave_out_unusable(sentences, features, ROWS, allow_dropped=True)
  assert [id(sentence) for sentence in found] == [id(sentences[0]), id(sentences[2])] and not caplog.messages
  elsewhere = iter([0, 1, 0])
  monkeypatch.setattr(base, "sum_over_processes", lambda num_dropped: num_dropped + 1)
  with pytest.raises(UserError, match="another process found records that cannot be used; its log names them"):
    validation.leave_out_unusable(sentences, features, ROWS, allow_dropped=False)


def test_the_log_names_what_validation_cannot_use_also_if_that_is_an_error(tmp_path, caplog):
  """Other processes refer to this log."""
  config, path = write_data(tmp_path / "data", "pairs", PLAIN)
  data = open_data(config)
  sentences = [data.sources["pairs"][index] for index in range(3)]
  path.unlink()
  with pytest.raises(UserError, match=r"listed records? cannot be used(:|, the first is) edges/"):
    validation.leave_out_unusable(sentences, make_features(config, data, None), ROWS, allow_dropped=False)
  assert any(message.startswith("dropped: edges/") and path.name in message for message in caplog.messages)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_vanish_while_training(tmp_path, caplog, kind):
  config, path = write_data(tmp_path / "data", kind, PLAIN)
  for allowed in (False, True):
    place_video(PLAIN, path, kind)
    data = open_data(config)
    path.unlink()
    loader = open_loader(data, make_features(config, data, None), allow_dropped=allowed)
    if not allowed:
      message = rf"({RECORDS[kind]}).*cannot be used: .*[nN]o such .*{path.name}"
      with closing(loader), pytest.raises(UserError, match=message):
        for _ in range(20):
          next(loader)
      continue
    caplog.clear()
    with closing(loader):
      rows = [next(loader) for _ in range(20)]
    assert all((row.segment_ids > 0).any() for row in rows)
    dropped = [message for message in caplog.messages if message.startswith("dropped: ")]
    assert dropped and len(dropped) == len(set(dropped)) and all(path.name in message for message in dropped)


class FailingSource:
  """Sentences, the reading of one of which fails a number of times."""

  task_names = ()

  def __init__(self, *errors: Exception):
    self.errors = list(errors)

  def __len__(self) -> int:
    return 20

  def __getitem__(self, index: int) -> Sentence:
    if index == 7 and self.errors:
      raise self.errors.pop()
    clip = np.full((1, 16, 16, 3), index, np.uint8)
    return Sentence(clips=(clip,), roles=(Role.TARGET,), record=f"line {index}")


def test_only_what_is_dropped_in_a_row_ends_a_run(monkeypatch):
  """Two are allowed; sentence 2 is read between 0, 1 and 3, 4."""

  def make(sentence, *_):
    if sentence.record != "line 2":
      raise UserError("damaged")
    return mock.Mock(arrays=dict)

  monkeypatch.setattr(loader, "MAX_DROPPED_IN_A_ROW", 2)
  monkeypatch.setattr(loader, "make_fitting", make)
  encoded = loader.EncodedSource(FailingSource(), mock.Mock(), {}, allow_dropped=True, is_shared=False)
  assert [encoded[index] for index in (0, 1, 2, 3, 4, 2)] == [None, None, {}, None, None, {}]
  assert encoded[5] is None and encoded[6] is None
  with pytest.raises(UserError, match="line 8 cannot be used: damaged"):
    encoded[8]


def read_all(*errors: Exception, **ownership: Any) -> list[float]:
  """Returns one number of each sentence that fills a row, in order."""
  loader = make_loader(
    [FailingSource(*errors)],
    FeatureMaker(CountingEncoders(), shape=Shape(), task_names=[""]),
    row_shape=RowShape(num_tokens=4, num_text_tokens=8, num_slots=1),
    layout=BatchLayout(num_rows=20),
    seed=0,
    ownership=dataclasses.replace(RowOwnership.whole(20), **ownership),
    options=LoaderOptions(allow_dropped=True),
  )
  with closing(loader):
    return next(loader).tokens[:, 0, 0].tolist()


def test_processes_that_share_rows_fill_them_with_the_same(caplog):
  """They drop what is too long for all of them, but nothing that only one may have failed to read."""

  def passing() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))

  def unreadable(cause: Exception) -> UserError:
    error = UserError("cannot read 7.mp4")
    error.__cause__ = cause
    return error

  undisturbed = read_all(is_shared=True)
  assert read_all(passing(), is_shared=False) != undisturbed
  assert read_all(passing(), is_shared=True) == read_all(unreadable(passing()), is_shared=True) == undisturbed
  for errors in ([passing(), passing()], [unreadable(ValueError())] * 2):
    with pytest.raises(UserError, match=r"sentence 7 cannot be used: .*; it is not dropped, as another process"):
      read_all(*errors, is_shared=True)
  assert read_all(CacheError("full"), is_shared=True) == undisturbed
  for errors, is_shared in (([CacheError("full")], False), ([CacheError("full"), CacheError("full")], True)):
    with pytest.raises(CacheError, match="full"):
      read_all(*errors, is_shared=is_shared)
  caplog.clear()
  assert read_all(*[TooLongError("7 is too long")] * 2, is_shared=True) != undisturbed
  assert caplog.messages == ["dropped: sentence 7: 7 is too long"]
  with pytest.raises(UserError, match="it is not dropped, as another process that reads the same stream"):
    read_all(passing(), passing(), num_owners=2)  # which a single stream serves


def test_limits_of_rows_that_are_too_small_are_named_once(tmp_path, caplog):
  """Not hundreds of sentences, and with the value that the longest of them needs."""
  config, _ = write_data(tmp_path / "data", "pairs", PLAIN)
  data = open_data(config)
  features, rows = make_features(config, data, None), dataclasses.replace(ROWS, num_tokens=10)
  with pytest.raises(
    UserError, match=r"listed records cannot be used, .*; set config.rows.num_tokens to (\d+), or"
  ) as all_:
    prepare(features, data, row_shape=rows)
  needed = int(re.findall(r"num_tokens to (\d+)", str(all_.value))[0])
  assert not prepare(features, data, row_shape=dataclasses.replace(rows, num_tokens=needed)).dropped
  assert prepare(features, data, row_shape=dataclasses.replace(rows, num_tokens=needed - 1), allow_dropped=True).dropped
  assert len(caplog.messages) == 2 and all(
    re.match(rf"dropped: \d+ sentences that do not fit into a row, the longest is .* has {needed} tokens, ", message)
    for message in caplog.messages
  )
  caplog.clear()
  errors = [TooLongError(f"{needed}", key="config.rows.num_text_tokens", needed=needed) for needed in (9, 7, 5, 5, 5)]
  with pytest.raises(
    UserError, match=r"6 .* set config.rows.num_text_tokens to 9 and fix the others, or leave them out"
  ):
    base.report_dropped([base.drop("x", error) for error in (*errors, OSError("gone"))], allowed=False)
  assert [message.partition(",")[0] for message in caplog.messages] == [
    "dropped: x: gone",
    "dropped: 5 sentences that do not fit into a row",
  ]
  read_all(*errors[:2], is_shared=True)
  assert caplog.messages[2:] == ["dropped: sentence 7: 9"]


def test_a_cache_that_cannot_be_written_drops_nothing(tmp_path, monkeypatch):
  """The records are not to blame for a full disk, also where they may be dropped."""
  config, _ = write_data(tmp_path / "data", "folder", PLAIN)
  data = open_data(override(config, {"init_from": "base"}))
  features = make_features(config, data, tmp_path)

  def write_bytes(path, contents):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

  monkeypatch.setattr(Path, "write_bytes", write_bytes)
  loader = open_loader(data, features, allow_dropped=True)
  message = rf"cannot write to the cache: No space left on device: '{tmp_path}/cache/prompts"
  with pytest.raises(OSError, match=message):
    prepare(features, data, row_shape=ROWS, allow_dropped=True)
  with closing(loader), pytest.raises(OSError, match="cannot write to the cache: No space left on device"):
    next(loader)


def test_a_cache_that_cannot_be_read_drops_nothing(tmp_path, monkeypatch):
  """Nor for a bucket that does not answer."""
  config, _ = write_data(tmp_path / "data", "folder", PLAIN)
  monkeypatch.setattr(bucket_files, "CACHE_FOLDER", str(tmp_path / "copies"))
  config = override(config, {"init_from": "base", "data.cache": str(open_bucket("cache"))})
  data = open_data(config)
  features = make_features(config, data, tmp_path)
  prepare(features, data, row_shape=ROWS)

  def fail(*args, **kwargs):
    raise RuntimeError("Service Unavailable")

  monkeypatch.setattr(Bucket, "_open", fail)
  message = "cannot read the cache: RuntimeError: Service Unavailable: 's3://bucket/cache/.*'"
  with pytest.raises(CacheError, match=message):
    prepare(features, data, row_shape=ROWS, allow_dropped=True, verify=True)
  with closing(open_loader(data, features, allow_dropped=True)) as loader, pytest.raises(CacheError, match=message):
    next(loader)


def test_tfds_examples_that_are_damaged_while_training(tmp_path, caplog):
  names = {"name": "scenes", "task": "x", "source": "image", "target": "labels", "kind": "segmentation"}
  changes = {f"data.tfds.{name}": value for name, value in (names | {"data_dir": write_tfds(tmp_path)}).items()}
  config = override(tiny(), CHANGES | changes)
  (path,) = (tmp_path / "data").rglob("*.array_record*")
  content = path.read_bytes()
  for damage, allowed in ((slice(16000, 17000), False), (slice(16000, 17000), True), (slice(None), False)):
    path.write_bytes(content)
    data = open_data(config)
    damaged = bytearray(content)
    damaged[damage] = bytes(len(damaged[damage]))
    path.write_bytes(damaged)
    features = make_features(config, data, None)
    caplog.clear()
    loader = open_loader(data, features, allow_dropped=allowed)
    pair = r"train\.array_record-00000-of-00001__\d"
    message = (
      rf"^x/{pair} with the examples {pair} cannot be used: example \d of scenes/1\.0\.0, split train cannot be read: "
    )
    with closing(loader):
      if not allowed:
        with pytest.raises(UserError, match=message):
          for _ in range(20):
            next(loader)
        continue
      assert all((next(loader).segment_ids > 0).any() for _ in range(20))
    dropped = [message for message in caplog.messages if message.startswith("dropped: ")]
    assert 1 <= len(dropped) <= 3 and len(dropped) == len(set(dropped))
  with pytest.raises(UserError, match=r"nothing in config\.data\.tfds can be used: .*, split train cannot be read"):
    open_data(config)


def test_data_without_a_usable_sentence_ends(tmp_path, monkeypatch):
  monkeypatch.setattr("univid_jax.data.rows.loader.MAX_DROPPED_IN_A_ROW", 30)
  config, _ = write_data(tmp_path / "data", "folder", PLAIN)
  data = open_data(config)
  shutil.rmtree(tmp_path / "data")
  features = make_features(config, data, None)
  loader = open_loader(data, features, allow_dropped=True)
  with closing(loader), pytest.raises(UserError, match="cannot be used"):
    next(loader)


@pytest.mark.parametrize("has_base", [False, True], ids=["without a base", "with a base"])
def test_prepare_finds_sentences_that_fit_no_row(tmp_path, has_base):
  clips = [{"path": "v.mp4", "num_frames": 5}] * 6
  write_video(tmp_path / "v.mp4", 12)
  lines = [{"clips": [*clips[:count], {"path": "v.mp4", "role": "target"}], "prompt": "x"} for count in (1, 5, 3)]
  (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
  config = override(tiny(), CHANGES | {"data.manifest": str(tmp_path / "m.jsonl"), "init_from": "base" * has_base})
  data = open_data(config)
  features = make_features(config, data, tmp_path / "work" if has_base else None)
  small = RowShape(num_tokens=66, num_text_tokens=8, num_slots=2)
  with pytest.raises(
    UserError, match=r"used: m\.jsonl line 2: a sentence.*has 72 tokens, .*config\.rows\.num_tokens = 66"
  ):
    prepare(features, data, row_shape=small)
  assert len(prepare(features, data, row_shape=small, allow_dropped=True).dropped) == 1
  assert not prepare(features, data, row_shape=ROWS).dropped


def test_prepare_replaces_damaged_cache_entries(tmp_path, caplog):
  config, _ = write_data(tmp_path / "data", "metadata", PLAIN)
  config = override(config, {"init_from": "base"})
  data = open_data(config)
  features = make_features(config, data, tmp_path)
  first = prepare(features, data, row_shape=ROWS)
  path = next((tmp_path / "cache" / "latents").glob("*/*.safetensors"))
  content = bytearray(path.read_bytes())
  content[-50] ^= 1
  path.write_bytes(content)
  assert prepare(features, data, row_shape=ROWS, verify=True).num_encoded == 1
  assert f"{path} is corrupt and is computed again" in caplog.messages
  assert prepare(features, data, row_shape=ROWS, verify=True).num_encoded == 0 < first.num_encoded


def test_pairs_of_a_manifest_have_one_length(tmp_path, caplog):
  """Unless it gives both."""
  write_video(tmp_path / "long.mp4", 20)
  write_video(tmp_path / "short.mp4", 11)
  clips = [{"path": name} for name in ("long.mp4", "long.mp4", "short.mp4")]
  lines = [
    {"clips": [*clips, {"path": "long.mp4", "role": "target"}]},
    {"clips": [*clips[:2], clips[2] | {"num_frames": 9}, {"path": "long.mp4", "role": "target", "num_frames": 13}]},
  ]
  (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
  config = override(tiny(), CHANGES | {"data.manifest": str(tmp_path / "m.jsonl"), "data.num_frames": 17})
  data = open_data(config)
  lengths = [[clip.num_frames for clip in data.sources["manifest"][i].clips] for i in range(2)]
  assert lengths == [[17, 17, 9, 9], [17, 17, 9, 13]]
  with caplog.at_level("INFO", "univid_jax"):
    data.report(config.data)
  assert "data: manifest, 6 clips: frames 0 to 16 of 20" in caplog.text
  assert "data: manifest, 2 clips: frames 0 to 8 of 11" in caplog.text


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "", ".", "a/..", "a\0.png"])
def test_listed_files_stay_inside_their_folder(tmp_path, name):
  folder = tmp_path / "data"
  folder.mkdir()
  write_image(tmp_path / "out.png")
  (folder / "m.jsonl").write_text(json.dumps({"clips": [{"path": name, "role": "target"}]}))
  with pytest.raises(UserError, match=r"m\.jsonl line 1: .* must be a path inside"):
    open_data(override(tiny(), CHANGES | {"data.manifest": str(folder / "m.jsonl")}))
  if "\0" not in name:
    write_table(folder, [(name, "x")])
    with pytest.raises(UserError, match=r"metadata\.csv line 2 .* must be a path inside"):
      open_data(override(tiny(), CHANGES | {"data.metadata": str(folder)}))


LINES = ("[]", "3", '"x"', "NaN", "{", "[" * 100_000, '{"clips": 3}', '{"clips": []}', '{"clips": [3]}')
CLIPS = ('{"path": 3}', '{"path": "a.png", "start": "x"}', '{"path": "a.png", "num_frames": null}')


@pytest.mark.parametrize("line", [*LINES, *(f'{{"clips": [{clip}]}}' for clip in CLIPS)])
def test_malformed_lines_are_named(tmp_path, line):
  write_image(tmp_path / "a.png")
  (tmp_path / "m.jsonl").write_text(line)
  with pytest.raises(UserError, match=r"m\.jsonl line 1: "):
    open_data(override(tiny(), CHANGES | {"data.manifest": str(tmp_path / "m.jsonl")}))


def test_files_that_are_not_text_are_named(tmp_path):
  for key, name in (("manifest", "m.jsonl"), ("metadata", "metadata.csv")):
    (tmp_path / name).write_bytes(np.arange(256).astype(np.uint8).tobytes())
    with pytest.raises(UserError, match=f"{name} is not"):
      open_data(override(tiny(), CHANGES | {f"data.{key}": str(tmp_path / name)}))


def test_what_is_no_file_in_a_folder_is_named(tmp_path):
  write_image(tmp_path / "a.png")
  (tmp_path / "gone.png").symlink_to("nowhere.png")
  (tmp_path / "loop.png").symlink_to("loop.png")
  os.mkfifo(tmp_path / "pipe.mp4")
  (tmp_path / "frames.png").mkdir()
  dropped = FolderSource.open(str(tmp_path), side=16).dropped
  assert [each.record for each in dropped] == ["gone.png", "loop.png", "pipe.mp4"]


@pytest.mark.parametrize("path", ["nowhere", "ftp://bucket/file"])
def test_paths_that_cannot_be_read_are_named_with_their_key(tmp_path, path):
  path = path if "://" in path else str(tmp_path / path)
  data = [f"data.{name}" for name in ("folder", "test_folder", "metadata", "pairs", "manifest", "arc.path")]
  openers = dict.fromkeys([*data, "data.arc.test_path", "data.test_pairs"], open_data)
  openers |= dict.fromkeys(["init_from", "validation.accelerate"], lambda config: set_up_run(config, tmp_path / "run"))
  openers["eval.palette"] = Scorer
  write_pairs(tmp_path / "pairs")
  for key, opener in openers.items():
    training = {"data.pairs": str(tmp_path / "pairs")} if key == "data.test_pairs" else {}
    with pytest.raises((UserError, OSError), match=rf"config\.{re.escape(key)}: .*{re.escape(path)}"):
      opener(override(tiny(), training | {key: [path] if key == "validation.accelerate" else path}))
