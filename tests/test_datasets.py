"""Data of one's own: what each reader accepts, and how it names what it cannot use."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections import Counter, UserList
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.clip_files import (
  FORM,
  draw_options,
  read_greys,
  read_lengths,
  write_image,
  write_metadata,
  write_pairs,
  write_table,
  write_tfds,
  write_video,
)
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.config.schema import TFDSConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle, Resampling, TargetKind
from univid_jax.core.sentence import Role, read_frames
from univid_jax.data import joint_reading
from univid_jax.data.clips import ClipFormat, Footage, resampling_to
from univid_jax.data.fingerprint import describe_changes, find_shared, fingerprint
from univid_jax.data.media.reader import read_clip
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.media.writer import write_clip
from univid_jax.data.sources.base import hold_out, indices_by_task
from univid_jax.data.sources.computed import ComputedSentences
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.listed import ListedSentences, count_shown_targets
from univid_jax.data.sources.open import DataSources, open_data
from univid_jax.data.sources.pairs import PairSentences, check_aligned
from univid_jax.data.sources.readers.arc import ARCSentences
from univid_jax.data.sources.readers.jsonl import open_manifest
from univid_jax.data.sources.readers.metadata_csv import open_metadata
from univid_jax.data.sources.readers.pair_folder import open_pairs
from univid_jax.data.sources.readers.tfds import feature_to_frames, open_tfds
from univid_jax.data.sources.unused_keys import describe_unused_keys
from univid_jax.data.target_kinds import label_colors
from univid_jax.evaluation.sentences import plan_sentences
from univid_jax.training.validation import select_sentences


@pytest.fixture
def metadata(tmp_path):
  return write_metadata(tmp_path / "metadata")


@pytest.fixture
def pairs(tmp_path):
  return write_pairs(tmp_path / "pairs")


class TestMetadata:
  def test_targets_are_resized_as_their_kind_asks(self, metadata):
    """Records of a table have no task, so that their kind is that of the empty one."""
    for kinds, resample in (({}, Resampling.BICUBIC), ({"": "depth"}, Resampling.NEAREST)):
      source = open_data(override(tiny(), {"data.metadata": str(metadata), "data.kinds": kinds})).sources["metadata"]
      found = [part.form.resample for part in source.records[0].footage]
      assert found == [Resampling.BICUBIC, resample] * 2

  def test_clips_are_quarters_of_the_file(self, metadata):
    """Each clip is the start of its quarter; all four contexts are drawn, with their lengths."""
    sentences, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert not dropped and len(sentences) == 16
    seen = {}
    for index in range(16):
      sentence = sentences[index]
      quarter = (6, 7)[index % 2]
      seen[sentence.context] = read_lengths(sentence)
      assert [read_greys(clip)[0] for clip in sentence.clips] == [8 * quarter * i // 4 * 4 for i in range(4)]
      assert sentence.prompt == ("first", "second")[index % 2]
      assert sentence.roles == (Role.CONTEXT,) * 3 + (Role.TARGET,)
    assert seen == {"I": [5, 5, 5, 5], "II": [1, 1, 1, 1], "III": [1, 1, 5, 5], "IV": [1, 5, 1, 5]}

  def test_unused_texts_are_counted(self, metadata, caplog):
    table = metadata / "metadata.csv"
    write_table(metadata, [("one é.mp4", "first"), ("two.mp4", "")])
    manifest, clip = metadata / "lines.jsonl", {"path": "one é.mp4"}
    lines = [{"clips": [clip, clip | {"role": "target"}]} | prompt for prompt in ({"prompt": "x"}, {})]
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with caplog.at_level("INFO", logger="univid_jax"):
      for style, expected in ((PromptStyle.NULL, {""}), (PromptStyle.ROUGH, {"first", "x", ""})):
        options = draw_options(prompt_style=style)
        sources = [open_metadata(str(table), FORM, options), open_manifest(str(manifest), FORM, options)]
        assert {record.prompt for source, _ in sources for record in source.records} == expected
    message = "1 text is not used, as config.data.prompt is null; rough and detailed use your own"
    assert caplog.messages == [f"{table}: {message}", f"{manifest}: {message}"]

  def test_reversal_and_dropped_prompts(self, metadata):
    options = draw_options(reverse_probability=1.0, prompt_style=PromptStyle.NULL)
    reversed_sentences, _ = open_metadata(str(metadata / "metadata.csv"), FORM, options)
    assert [read_greys(clip)[0] for clip in reversed_sentences[0].clips] == [48, 0, 144, 96]
    assert {reversed_sentences[i].prompt for i in range(16)} == {""}
    sometimes, _ = open_metadata(str(metadata), FORM, draw_options(prompt_dropout=0.5))
    assert 2 <= sum(sometimes[i].prompt == "" for i in range(16)) <= 14

  def test_unusable_lines_are_named(self, metadata):
    write_video(metadata / "short.mp4", 16)
    whole = (metadata / "one é.mp4").read_bytes()
    (metadata / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (metadata / "empty.mp4").write_bytes(b"")
    (metadata / "text.mp4").write_text("hello")
    (metadata / "notes.txt").write_text("hello")
    names = ("one é.mp4", "one é.mp4", "short.mp4", "cut.mp4", "empty.mp4", "text.mp4", "gone.mp4", "notes.txt")
    write_table(metadata, [(name, "x") for name in names])
    sentences, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert len(sentences.records) == 1
    expected = [
      "is listed twice",
      "16 frames, 4 for each of its four clips, and 5 are needed",
      "cut.mp4",
      "empty.mp4",
      "text.mp4",
      "no such file",
      "notes.txt",
    ]
    for line, (record, message) in enumerate(zip(dropped, expected, strict=True), 3):
      assert f"line {line} " in record.record and message in str(record)

  def test_a_file_whose_clips_cannot_be_equally_long(self, metadata):
    """Quarters of 17 + 17 + 17 + 14 frames would begin in the clip before."""
    for count in (65, 66, 67):
      write_video(metadata / f"{count}.mp4", count)
    write_table(metadata, [(f"{count}.mp4", "x") for count in (65, 66, 67)])
    sentences, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert not sentences.records
    for count, record in zip((65, 66, 67), dropped, strict=True):
      assert f"{count}.mp4 has {count} frames, which are not four clips of equal length" in record.reason

  @pytest.mark.parametrize("fps, length", [(8, 13), (16, 25), (7, 11), (10.0, 16)])
  def test_no_clip_shows_frames_of_another_at_any_rate(self, metadata, fps, length):
    write_video(metadata / "long.mp4", 52, size=(32, 48))
    write_table(metadata, [("long.mp4", "x")])
    form = dataclasses.replace(FORM, fps=fps, num_frames=9)
    sentences, dropped = open_metadata(str(metadata), form, draw_options())
    assert not dropped
    for quarter, footage in enumerate(sentences.records[0].footage):
      greys = [8 * i % 256 for i in range(13 * quarter, 13 * quarter + 13)]
      assert footage.num_frames == length
      shown = read_greys(footage.clip(length))
      assert shown[0] == greys[0] and set(shown) <= set(greys)

  def test_clips_of_a_file_are_aligned_at_another_rate(self, metadata):
    """Frame n of each is shown n / fps seconds after its own first, wherever that is in the file."""
    write_video(metadata / "one.mp4", 28)
    write_table(metadata, [("one.mp4", "x")])
    form = dataclasses.replace(FORM, fps=6.4)  # of 8: without every fifth
    sentences, dropped = open_metadata(str(metadata), form, draw_options(contexts={"I": 1.0}))
    assert not dropped
    alone = [footage.clip(5) for footage in sentences.records[0].footage]
    for clips in (sentences[0].clips, alone):
      assert [read_greys(clip) for clip in clips] == [[8 * (7 * i + n) for n in (0, 1, 2, 3, 5)] for i in range(4)]
    assert sentences.records[0].footage[1].num_frames == 5

  def test_a_file_with_sound_alone(self, metadata):
    import av

    with av.open(str(metadata / "sound.mp4"), "w") as container:
      stream = container.add_stream("aac", rate=44100)
      frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
      frame.rate = 44100
      for packet in (*stream.encode(frame), *stream.encode()):
        container.mux(packet)
    write_table(metadata, [("sound.mp4", "x")])
    _, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert "no video in" in dropped[0].reason

  def test_missing_columns_and_tables(self, metadata):
    write_table(metadata, [("one.mp4", "x")], header=("file", "text"))
    with pytest.raises(UserError, match="has no column file_name; its columns are 'file', 'text'"):
      open_metadata(str(metadata), FORM, draw_options())
    with pytest.raises(FileNotFoundError, match="no such table"):
      open_metadata(str(metadata / "nowhere"), FORM, draw_options())

  @pytest.mark.parametrize(
    "header, message",
    [
      ("file_name, text", "its columns are 'file_name', ' text'$"),
      ("file_name;text", "; fields are separated by commas"),
    ],
  )
  def test_headers_are_shown_as_they_are(self, metadata, header, message):
    (metadata / "metadata.csv").write_text(f"{header}\none.mp4,x\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
      open_metadata(str(metadata), FORM, draw_options())

  def test_empty_lines_before_the_header(self, metadata):
    (metadata / "metadata.csv").write_text("\n\nfile_name,text\none é.mp4,x\n", encoding="utf-8")
    source, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert not dropped and len(source.records) == 1

  def test_repeated_columns(self, metadata):
    """The last of them would count, or nothing where a line is shorter."""
    write_table(metadata, [("one.mp4", "x")], header=("file_name", "text", "file_name"))
    with pytest.raises(UserError, match="has several columns file_name"):
      open_metadata(str(metadata), FORM, draw_options())

  def test_lines_with_fewer_and_more_fields(self, metadata):
    """A text with a comma was cut there; empty fields, as of a table that ends in commas, lose nothing."""
    write_video(metadata / "three.mp4", 24)
    write_table(metadata, [("one é.mp4",), ("two.mp4", "x", "", " "), ("three.mp4", "a cat", " a dog")])
    source, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert [(record.footage[0].path.name, record.prompt) for record in source.records] == [("two.mp4", "x")]
    cut_off, left_out = dropped
    assert cut_off.reason == "the record ends before the column text: empty fields need their commas, too"
    assert left_out.record == "metadata.csv line 4 (three.mp4)"
    assert "no column for ' a dog': a text with commas needs quotes" in left_out.reason
    write_table(metadata, [("one é.mp4", "")])
    source, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert not dropped and source.records[0].prompt == ""

  def test_a_quote_that_is_not_closed(self, metadata):
    """It swallowed the rest of the table."""
    lines = 'file_name,text\n\n"one é.mp4","two\nlines"\ntwo.mp4,"open\ngone.mp4,y\ngone.mp4,z\n'
    (metadata / "metadata.csv").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match="the record that begins in line 5 has a fault, unexpected end of data"):
      open_metadata(str(metadata), FORM, draw_options())

  def test_messages_name_lines_of_the_file(self, metadata):
    lines = 'file_name,text\n\n"one é.mp4","two\nlines"\ngone.mp4,y\n"a\nb.mp4",z\nlast.mp4,z\n'
    (metadata / "metadata.csv").write_text(lines, encoding="utf-8")
    sentences, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert [record.name for record in sentences.records] == ["metadata.csv line 3 (one é.mp4)"]
    names = ["line 5 (gone.mp4)", "line 6 (a\\nb.mp4)", "line 8 (last.mp4)"]
    assert [record.record.removeprefix("metadata.csv ") for record in dropped] == names
    assert not any("\n" in str(record) for record in dropped)

  def test_other_spellings_of_a_file(self, metadata):
    """The same file under another path is listed twice, too."""
    names = ("two.mp4", "./two.mp4", "train/two.mp4", "train/../one é.mp4", "one é.mp4")
    write_table(metadata, [(name, "x") for name in names])
    sentences, dropped = open_metadata(str(metadata), FORM, draw_options())
    assert len(sentences.records) == 2
    assert [record.reason for record in dropped] == ["the file is listed twice"] * 3


class TestPairs:
  def test_pairs_of_different_names_are_joined(self, pairs):
    options = draw_options(num_clips={4: 1.0, 6: 1.0, 8: 1.0})
    sentences, dropped = open_pairs(str(pairs), FORM, options)
    assert not dropped and sentences.task_names == ("depth map", "edges")
    counts, contexts = set(), set()
    for index in range(len(sentences)):
      sentence = sentences[index]
      counts.add(len(sentence.clips))
      contexts.add((sentence.task, sentence.context))
      shades = [read_greys(clip)[0] // 40 for clip in sentence.clips]
      assert shades[::2] == shades[1::2] and shades[-2] not in shades[:-2:2]
      assert len(shades) > 6 or len(set(shades)) == len(shades) // 2, "examples repeat only if there are too few"
      assert sentence.prompt.count(sentence.task) == 2
    assert counts == {4, 6, 8}
    # Images make no videos.
    assert contexts == {("edges", "II"), *(("depth map", name) for name in ("I", "II", "III", "IV"))}

  def test_sentences_with_videos_can_be_limited_to_fewer_clips(self, pairs):
    options = draw_options(num_clips={8: 1.0}, max_video_clips=4)
    sentences, _ = open_pairs(str(pairs), FORM, options)
    sentences = [sentences[index] for index in range(len(sentences))]
    assert {(s.context == "II", len(s.clips)) for s in sentences} == {(True, 8), (False, 4)}

  def test_pairs_of_one_bucket_are_joined(self, pairs):
    for number, name in enumerate(("u", "v")):
      folder = pairs / "edges" / name
      folder.mkdir()
      for part in ("source.png", "target.png"):
        write_image(folder / part, shade=40 * number, size=(50, 30))
    form = ClipFormat(size=(16, 24), num_frames=5, buckets=((32, 16),))
    sentences, dropped = open_pairs(str(pairs), form, draw_options(contexts={"II": 1.0}))
    assert not dropped
    sizes = set()
    for index in range(len(sentences)):
      shapes = {read_frames(clip).shape[1:3] for clip in sentences[index].clips}
      assert len(shapes) == 1
      sizes |= shapes
    assert sizes == {(16, 24), (32, 16)}

  def test_both_clips_of_a_pair_have_one_size(self, pairs):
    """Although the bucket nearest to the target's shape is another one."""
    for name in ("a", "b b", "c"):
      write_image(pairs / "edges" / name / "source.png", size=(63, 100))
      write_image(pairs / "edges" / name / "target.jpg", size=(64, 100))
    form = ClipFormat(size=(48, 80), num_frames=5, buckets=((48, 72),))
    assert form.for_shape((63, 100)).size != form.for_shape((64, 100)).size
    sentences, _ = open_pairs(str(pairs), form, draw_options(contexts={"II": 1.0}))
    for sentence in map(sentences.__getitem__, range(len(sentences))):
      assert len({read_frames(clip).shape for clip in sentence.clips}) == 1

  def test_every_task_has_its_sentences(self, tmp_path):
    """Whatever their order and number: those of every pair of a task come before a pair repeats."""
    for task, count in (("depth", 30), ("edges", 3), ("style", 10)):
      for number in range(count):
        folder = tmp_path / task / f"{number:02}"
        folder.mkdir(parents=True)
        for part in ("source.png", "target.png"):
          write_image(folder / part)
    options = draw_options(contexts={"II": 1.0})
    held_out = open_pairs(str(tmp_path), FORM, options)[0].split(0.34)[1]
    indices = {task: list(numbers) for task, numbers in indices_by_task(held_out).items()}
    assert sorted(itertools.chain(*indices.values())) == list(range(len(held_out)))
    for task, count in (("depth", 10), ("edges", 1), ("style", 3)):
      sentences = [held_out[index] for index in indices[task]]
      assert {sentence.task for sentence in sentences} == {task} and len(sentences) == count * options.variants
      queries = [sentence.record.partition(" ")[0] for sentence in sentences]
      assert len(set(queries[:count])) == count
    data = DataSources({}, {}, [], {"pairs": held_out})
    chosen = select_sentences(data, override(tiny(), {"validation.sentences": 9}))
    assert Counter(sentence.task for sentence in chosen) == {"depth": 3, "edges": 3, "style": 3}
    planned = plan_sentences(override(tiny(), {"eval.sentences_per_case": 4}), data.held_out)
    assert Counter(each.case.task for each in planned) == {"depth": 4, "edges": 4, "style": 4}

  def test_reversal(self, pairs):
    options = draw_options(reverse_probability=1.0, contexts={"I": 1.0, "II": 0.1})
    sentences, _ = open_pairs(str(pairs), FORM, options)
    assert [grey % 40 for clip in sentences[0].clips for grey in read_greys(clip)[:1]] == [4, 0, 4, 0]

  def test_targets_of_labels_are_resized_without_mixing(self, pairs):
    """A map of two labels has two colours after resizing, but an image has more."""
    board = np.random.default_rng(0).integers(0, 2, (6, 8)).repeat(5, 0).repeat(5, 1) * 255
    for name in ("a", "b b", "c"):
      (pairs / "edges" / name / "target.jpg").unlink()
      Image.fromarray(board.astype(np.uint8)).save(pairs / "edges" / name / "target.png")
    colors = {}
    for kind in (TargetKind.SEGMENTATION, TargetKind.IMAGE):
      sentences, _ = open_pairs(str(pairs), FORM, draw_options(contexts={"II": 1.0}), kinds={"edges": kind})
      targets = [sentence.clips[1] for sentence in map(sentences.__getitem__, range(8)) if sentence.task == "edges"]
      colors[kind] = len(np.unique(read_frames(targets[0])))
    assert colors[TargetKind.SEGMENTATION] == 2 < colors[TargetKind.IMAGE]

  @pytest.mark.parametrize("name", ["outline", "scribble", "arc"])
  def test_tasks_that_are_called_like_built_in_ones_are_images(self, pairs, name):
    (pairs / "edges").rename(pairs / name)
    data = {"data.pairs": str(pairs), "data.height": 16, "data.width": 24, "data.contexts": {"II": 1.0}}
    for kinds, resample in (({}, Resampling.BICUBIC), ({name: "depth"}, Resampling.NEAREST)):
      config = override(tiny(), data | {"data.kinds": kinds})
      forms = {pair.target.form.resample for pair in open_data(config).sources["pairs"].pairs if pair.task == name}
      assert forms == {resample}

  def test_kinds_of_tasks_that_do_not_exist_are_reported(self, pairs, metadata, caplog):
    data = {"data.pairs": str(pairs), "data.kinds": {"edges": "edges", "dept map": "depth"}}
    open_data(override(tiny(), data))
    assert "config.data.kinds: no usable record has the task dept map; your tasks are depth map, edges" in caplog.text
    caplog.clear()
    open_data(override(tiny(), data | {"data.kinds": {"edges": "edges"}}))
    assert not caplog.text
    open_data(override(tiny(), {"data.metadata": str(metadata), "data.kinds": {"depth": "depth"}}))
    message = "config.data.kinds: no usable record has the task depth; your records have no task, their key is ''"
    assert message in caplog.text
    caplog.clear()
    open_data(override(tiny(), {"data.kinds": {"depth": "depth"}}))
    assert "no usable record" not in caplog.text, "there are no records"

  def test_unusable_pairs_are_named(self, pairs):
    (pairs / "edges" / "c" / "target.jpg").unlink()
    shutil.copy(pairs / "depth map" / "a" / "source.mp4", pairs / "depth map" / "a" / "source.mov")
    (pairs / "depth map" / "b b" / "target.mp4").unlink()
    write_video(pairs / "depth map" / "b b" / "target.mp4", 3)
    write_image(pairs / "edges" / "b b" / "target.jpg", size=(30, 30))
    shutil.copytree(pairs / "edges" / "a", pairs / "edges" / "d")
    shutil.copytree(pairs / "edges" / "a", pairs / "edges" / "e")
    Image.new("L", (20000, 20000)).save(pairs / "edges" / "e" / "source.png")
    sentences, dropped = open_pairs(str(pairs), FORM, draw_options())
    reasons = " | ".join(map(str, dropped))
    assert "must have one target.*, an image or a video, and has 0" in reasons
    assert "must have one source.*, an image or a video, and has 2" in reasons
    assert (
      "edges/b b: the source is 40 x 30 and the target 30 x 30 (width x height): cropped to one size they would not be"
      in reasons
    )
    assert "exceeds limit" in reasons and "decompression bomb" in reasons.lower()
    assert "the source has 6 frames and the target 3; 5 of each are needed" in reasons
    assert "depth map: a task needs pairs of at least two names" in reasons
    assert sentences.task_names == ("edges",)

  @pytest.mark.parametrize(
    "rates, fps, reason",
    [
      ((30, 15), 0, "the source has 30 frames per second and the target 15: set config.data.fps"),
      ((30, 15), 15, ""),
      ((30, 30000 / 1001), 0, ""),
      ((30, 30000 / 1001), 30, ""),
    ],
  )
  def test_rates_of_a_pair(self, tmp_path, rates, fps, reason):
    """Frame n of one is not frame n of the other unless both are resampled."""
    for name in "ab":
      (tmp_path / "task" / name).mkdir(parents=True)
      for part, rate in zip(("source", "target"), rates):
        frames = np.zeros((int(rate), 32, 48, 3), np.uint8)
        write_clip(tmp_path / "task" / name / f"{part}.mp4", frames, fps=rate)
    sentences, dropped = open_pairs(str(tmp_path), dataclasses.replace(FORM, fps=fps), draw_options())
    assert len(sentences.pairs) == (0 if reason else 2) and bool(dropped) == bool(reason)
    assert reason in str(dropped[:1])
    images, _ = open_pairs(str(tmp_path), FORM, draw_options(contexts={"II": 1.0, "I": 0.0}))
    assert len(images.pairs) == 2, "first frames show the same at any rate"

  @pytest.mark.parametrize(
    "own, start, message",
    [
      ((24000 / 1001, 30.0), 0, ""),
      ((24000 / 1001, 24000 / 1001), 2400, ""),
      ((30.0, 25.0), 2400, ""),
      ((24000 / 1001, 30.0), 400, ""),
      (
        (24000 / 1001, 30.0),
        2400,
        "read at 23.976 and 24 .*, and frame 2409 .* 2.4 frames .*: set config.data.fps=23.976",
      ),
      ((30.0, 24.04), 2400, "read at 24 and 24.04 .* set config.data.fps=24.04"),
    ],
  )
  def test_clips_that_drift_apart_are_refused(self, own, start, message):
    """A rate that hardly differs is kept, and after thousands of frames differs by some."""
    schedules = [Schedule.regular(5000, fps=rate, tick=Fraction(1, 120_000)) for rate in own]
    clips = [
      mock.Mock(
        spec=Footage, size=(16, 16), num_frames=900, start=start, form=form, **resampling_to(schedule, form.fps)
      )
      for form in [dataclasses.replace(FORM, fps=24.0)]
      for schedule in schedules
    ]
    for pair in (clips, clips[::-1]):
      with contextlib.nullcontext() if not message else pytest.raises(UserError, match=message):
        check_aligned(*pair, 9)

  @pytest.mark.parametrize(
    "lengths, num_frames, are_aligned",
    [
      ((5, 5), 9, True),
      ((5, 8), 9, False),
      ((5, 12), 9, False),
      ((9, 12), 9, True),
      ((1, 12), 9, True),
      ((5, 12), 1, True),
    ],
  )
  def test_lengths_of_a_pair(self, lengths, num_frames, are_aligned):
    """Equal, or both long enough; an image goes with any video."""
    for order in (lengths, lengths[::-1]):
      clips = [
        mock.Mock(spec=Footage, size=(16, 16), fps=None, is_resampled=False, num_frames=count, form=FORM)
        for count in order
      ]
      with contextlib.nullcontext() if are_aligned else pytest.raises(UserError, match="of each are needed"):
        check_aligned(*clips, num_frames)

  def test_what_has_no_rate_goes_with_any(self, pairs):
    for name in ("a", "b b", "c"):
      (pairs / "depth map" / name / "target.mp4").unlink()
      np.save(pairs / "depth map" / name / "target.npy", np.zeros((7, 32, 48, 3), np.uint8))
    _, dropped = open_pairs(str(pairs), FORM, draw_options())
    assert not dropped

  @pytest.mark.parametrize(
    "parts, fps, reason",
    [
      (
        ("source.npy", "target.mp4"),
        10,
        "the target is resampled from 30 to config.data.fps = 10 frames per second, and",
      ),
      (
        ("source.mp4", "target.npy"),
        10,
        "and the target has no rate and cannot be: set config.data.fps=0, or make a vid",
      ),
      (("source.npy", "target.mp4"), 30, ""),
      (("source.npy", "target.mp4"), 30000 / 1001, ""),
      (("source.npy", "target.mp4"), 29.8, "the target is resampled from 30 to config.data.fps = 29.8 frames per"),
      (("source.npy", "target.mp4"), 0, ""),
      (("source.npy", "target.npy"), 10, ""),
    ],
  )
  def test_what_has_no_rate_is_not_paired_with_what_is_resampled(self, tmp_path, parts, fps, reason):
    for name in "ab":
      (tmp_path / "task" / name).mkdir(parents=True)
      for part in parts:
        frames = np.stack([np.full((32, 48, 3), 8 * i, np.uint8) for i in range(30)])
        write_clip(tmp_path / "task" / name / part, frames, fps=30)
    form = dataclasses.replace(FORM, fps=fps)
    sentences, dropped = open_pairs(str(tmp_path), form, draw_options(contexts={"I": 1.0}))
    assert len(sentences.pairs) == (0 if reason else 2) and bool(dropped) == bool(reason)
    assert reason in str(dropped[:1])
    if not reason:
      source, target = sentences[0].clips[:2]
      assert read_greys(source) == read_greys(target) and len(set(read_greys(source))) == 5
    images, dropped = open_pairs(str(tmp_path), form, draw_options(contexts={"II": 1.0}))
    assert len(images.pairs) == 2 and not dropped, "first frames show the same at any rate"

  def test_names_are_in_lower_case(self, pairs):
    (pairs / "edges" / "c" / "target.jpg").rename(pairs / "edges" / "c" / "TARGET.JPG")
    _, dropped = open_pairs(str(pairs), FORM, draw_options())
    assert "has 0; the name is in lower case, so rename TARGET.JPG" in " ".join(map(str, dropped))

  def test_texts_that_are_not_read_are_named(self, pairs, caplog):
    for name in ("README.txt", "edges/notes.txt", "edges/a/._prompt.txt", "edges/a/LICENSE.txt"):
      (pairs / name).touch()
    (pairs / "edges" / "b b" / "prompt.txt").mkdir()
    open_pairs(str(pairs), FORM, draw_options())
    assert "text file" not in caplog.text
    for name in ("edges/a/prompt.txt", "edges/c.caption"):
      (pairs / name).touch()
    open_pairs(str(pairs), FORM, draw_options())
    assert f"{pairs}: 2 text files are not read, such as {pairs}/edges/c.caption: prompts are made of" in caplog.text

  def test_names_with_line_breaks(self, pairs):
    shutil.move(pairs / "edges" / "a", pairs / "edges" / "a\na")
    shutil.move(pairs / "edges" / "b b", pairs / "edges" / "b\nb")
    shutil.rmtree(pairs / "edges" / "c")
    (pairs / "edges" / "d\rd").mkdir()
    sentences, dropped = open_pairs(str(pairs), FORM, draw_options(contexts={"II": 1.0}))
    assert [record.record for record in dropped] == ["edges/d\\rd"] and len(str(dropped[0]).splitlines()) == 1
    names = {sentences[i].record for i in range(len(sentences)) if sentences[i].task == "edges"}
    assert names == {r"edges/a\na with the examples b\nb", r"edges/b\nb with the examples a\na"}

  def test_a_folder_without_pairs(self, tmp_path):
    with pytest.raises(UserError, match="no pairs in"):
      open_pairs(str(tmp_path), FORM, draw_options())
    (tmp_path / "name").mkdir()
    write_image(tmp_path / "name" / "source.png")
    with pytest.raises(UserError, match=r"no pairs in .*; the level of tasks is missing"):
      open_pairs(str(tmp_path), FORM, draw_options())
    with pytest.raises(
      UserError, match=r"no pairs in .*; this is a pair itself, so name the folder .* two levels above"
    ):
      open_pairs(str(tmp_path / "name"), FORM, draw_options())

  def test_a_task_without_pairs_is_named(self, pairs, caplog):
    (pairs / "style").mkdir()
    _, dropped = open_pairs(str(pairs), FORM, draw_options())
    assert not dropped and "style is left out: the folder of a task, which has no folders of pairs" in caplog.text

  @pytest.mark.parametrize("short", [0, 1, 3])
  def test_pairs_that_are_too_short_for_videos_are_reported(self, tmp_path, caplog, short):
    """One of them makes images of the whole task: without a word that would be mistaken for training on videos."""
    write_pairs(tmp_path)
    shutil.rmtree(tmp_path / "edges")
    for name in ("a", "b b", "c")[:short]:
      for part in ("source", "target"):
        write_video(tmp_path / "depth map" / name / f"{part}.mp4", 4)
    contexts = {"data.contexts.I": 0.3, "data.contexts.II": 0.3, "data.contexts.III": 0.4}
    config = override(tiny(), {"data.pairs": str(tmp_path), "data.num_frames": 5, **contexts})
    data = open_data(config)
    with caplog.at_level("INFO", "univid_jax"):
      data.report(config.data)
    found = {data.sources["pairs"][i].context for i in range(30)}
    assert found == ({"II"} if short else {"I", "II", "III"})
    are = "1 of its 3 pairs is" if short == 1 else f"{short} of its 3 pairs are"
    text = f"context I or III, for whose videos {are} too short, such as a with 4 frames instead of 5"
    assert (text in caplog.text) == bool(short) == ("has no sentences of context" in caplog.text)
    assert ("frames 0 to 4" in caplog.text) != bool(short), "what is read of a video is said as it is"

  def test_images_are_reported_quietly(self, pairs, caplog):
    config = override(tiny(), {"data.pairs": str(pairs), "data.num_frames": 5})
    open_data(config).report(config.data)
    assert "its pairs are images" not in caplog.text
    with caplog.at_level("INFO", "univid_jax"):
      open_data(config).report(config.data)
    assert "data: pairs, edges has no sentences of context I or III: its pairs are images" in caplog.text

  @pytest.mark.parametrize("part", ["source", "target"])
  def test_tasks_that_make_videos_of_images_are_reported_quietly(self, pairs, caplog, part):
    shutil.rmtree(pairs / "edges")
    other = {"source": "target", "target": "source"}[part]
    for folder in (pairs / "depth map").iterdir():
      (folder / f"{part}.mp4").unlink()
      Image.fromarray(read_clip(folder / f"{other}.mp4", 0, 1).frames[0]).save(folder / f"{part}.png")
    config = override(tiny(), {"data.pairs": str(pairs), "data.num_frames": 5})
    with caplog.at_level("INFO", "univid_jax"):
      open_data(config).report(config.data)
    (record,) = (record for record in caplog.records if "has no sentences" in record.message)
    assert record.levelname == "INFO"
    assert record.message.endswith(f"depth map has no sentences of context I or III: its {part}s are images")
    shutil.copy(pairs / "depth map" / "a" / f"{other}.mp4", pairs / "depth map" / "a" / f"{part}.mp4")
    (pairs / "depth map" / "a" / f"{part}.png").unlink()
    open_data(config).report(config.data)
    assert "for whose videos 2 of its 3 pairs are too short, such as b b with 1 frame instead of 5" in caplog.text

  def test_that_nothing_is_held_out_is_said_before_training(self, pairs, caplog):
    config = override(tiny(), {"data.pairs": str(pairs), "data.num_frames": 5})
    open_data(config).report(config.data)
    assert "data: nothing to validate and evaluate on: 3 records of a task are too few" in caplog.text
    assert "train with --config.data.held_out=0.34, which holds out one, or name a test set" in caplog.text
    caplog.clear()
    config = override(config, {"data.held_out": 0.34})
    open_data(config).report(config.data)
    assert "nothing to validate" not in caplog.text

  def test_held_out_pairs_are_only_queried(self, pairs):
    training, held_out = open_pairs(str(pairs), FORM, draw_options())[0].split(0.4)
    assert {(pair.task, pair.name) for pair in held_out.queries} == {("depth map", "b b"), ("edges", "b b")}
    for source, shade in ((training, {0, 2}), (held_out, {1})):
      sentences = [source[i] for i in range(len(source))]
      assert {read_greys(sentence.clips[-1])[0] // 40 for sentence in sentences} == shade
      assert {read_greys(sentence.clips[0])[0] // 40 for sentence in sentences} == {0, 2}

  def test_a_test_set_is_queried_with_training_examples(self, pairs, tmp_path):
    test_folder = tmp_path / "test"
    shutil.copytree(pairs / "edges", test_folder / "edges")
    shutil.copytree(pairs / "edges", test_folder / "scribbles")
    training, test = (open_pairs(str(folder), FORM, draw_options())[0] for folder in (pairs, test_folder))
    held_out, unusable = training.with_test_set(test)
    assert {held_out[i].task for i in range(len(held_out))} == {"edges"}
    assert len(unusable) == 3 and "scribbles/a: the training data has no example of its task" in str(unusable[0])


def test_clips_of_one_video_are_read_together(tmp_path, monkeypatch):
  """Whatever the order in which they are needed, and however often."""
  write_video(tmp_path / "one.mp4", 200)
  write_table(tmp_path, [("one.mp4", "x")])
  sentences, _ = open_metadata(str(tmp_path), FORM, draw_options(contexts={"I": 1.0}))
  alone = [footage.clip(5).read() for footage in sentences.records[0].footage]
  calls = []
  read_parts = joint_reading.read_parts
  monkeypatch.setattr(
    joint_reading, "read_parts", lambda *args, **options: calls.append(1) or read_parts(*args, **options)
  )
  for order, num_calls in (((0, 1, 2, 3), 1), ((3, 0, 2, 1), 1), ((2, 2, 0, 3), 2)):
    calls.clear()
    clips = sentences[0].clips
    assert all(np.array_equal(clips[i].read(), alone[i]) for i in order)
    assert len(calls) == num_calls


class TestWeights:
  """Weight 0 switches a kind of data off."""

  def config(self, metadata, **changes):
    data = {"data.metadata": str(metadata), "data.height": 32, "data.width": 48, "data.fps": 0.0}
    return override(tiny(), data | {f"data.{key}": value for key, value in changes.items()})

  def test_it_is_not_opened(self, metadata):
    config = self.config(metadata, pairs="/missing", manifest="/missing", **{"weights.pairs": 0, "weights.manifest": 0})
    data = open_data(config)
    assert data.sources.keys() == data.weights.keys() == {"metadata"}
    with pytest.raises(FileNotFoundError):
      open_data(override(config, {"data.weights.pairs": 0.5}))

  def test_one_kind_must_be_left(self, metadata):
    off = {"weights.metadata": 0, "weights.pairs": 0}
    message = r"all data is switched off: config\.data\.weights\.metadata and pairs must not all be 0"
    with pytest.raises(UserError, match=message):
      open_data(self.config(metadata, pairs="/missing", **off))
    with pytest.raises(UserError, match=r"config\.data\.weights\.computed must not be 0"):
      open_data(override(tiny(), {"data.weights.computed": 0}))

  @pytest.mark.parametrize("key", ["tasks", "contexts", "num_clips", "animating_contexts"])
  def test_sentences_must_have_something_to_be_drawn_from(self, key):
    config = override(tiny(), {"data.tasks": {"camera_movement": 1.0, "invert": 1.0}})
    config = override(config, {f"data.{key}": dict.fromkeys(getattr(config.data, key), 0.0)})
    data = open_data(config)  # evaluation leaves out what has no weight
    with pytest.raises(UserError, match=rf"the weights of config\.data\.{key} are all 0"):
      data.require_usable(config.data)

  @pytest.mark.parametrize(
    "changes",
    [
      {"data.tasks": {"camera_movement": 1.0}, "data.contexts": {"I": 0.0}},
      {"data.animating_contexts": {"I": 0.0}},
      {"data.grids.families": {"sudoku": 1.0}, "data.weights.computed": 0.0, "data.tasks": {"invert": 0.0}},
    ],
  )
  def test_weights_that_are_not_drawn_from_may_be_0(self, changes):
    config = override(tiny(), {"data.height": 64, "data.width": 64} | changes)
    open_data(config).require_usable(config.data)


@pytest.mark.parametrize("share, count, held_out", [(0.29, 100, 29), (0.7, 90, 63), (0.34, 3, 1), (0.33, 3, 0)])
def test_shares_that_floats_miss_are_held_out_whole(share, count, held_out):
  assert len(hold_out(range(count), share, group=lambda _: 0)[1]) == held_out


class TestManifest:
  def write(self, folder, *lines, form=FORM, **options):
    (folder / "m.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return open_manifest(str(folder / "m.jsonl"), form, draw_options(), **options)

  def test_any_sentence(self, tmp_path):
    """Six clips, two targets, with starts and lengths of their own."""
    write_video(tmp_path / "v.mp4", 12)
    write_image(tmp_path / "i.png", shade=200)
    clips = [
      {"path": "v.mp4", "start": 3},
      {"path": "v.mp4", "num_frames": 1},
      {"path": "i.png"},
      {"path": "i.png"},
      {"path": "v.mp4", "role": "target", "num_frames": 5},
      {"path": "i.png", "role": "target"},
    ]
    sentences, dropped = self.write(tmp_path, {"clips": clips, "prompt": "p", "task": "t"}, "")
    assert not dropped
    sentence = sentences[3]
    assert read_lengths(sentence) == [5, 1, 1, 1, 5, 1] and read_greys(sentence.clips[0]) == [24, 32, 40, 48, 56]
    assert sentence.roles == (Role.CONTEXT,) * 4 + (Role.TARGET,) * 2 and (sentence.prompt, sentence.task) == ("p", "t")

  def test_unicode_line_separators_do_not_end_lines(self, tmp_path):
    write_image(tmp_path / "i.png")
    line = {"clips": [{"path": "i.png"}, {"path": "i.png", "role": "target"}], "prompt": "a\u2028b\u0085c"}
    sentences, dropped = self.write(tmp_path, json.dumps(line, ensure_ascii=False), line)
    assert not dropped and sentences[0].prompt == line["prompt"]

  def test_unusable_lines_are_named(self, tmp_path):
    write_video(tmp_path / "v.mp4", 12)
    target = {"path": "v.mp4", "role": "target"}
    _, dropped = self.write(
      tmp_path,
      "{broken",
      {"clip": []},
      {"clips": [{"path": "gone.mp4"}]},
      {"clips": [{"role": "target"}]},
      {"clips": [{**target, "num_frames": 4}]},
      {"clips": [{**target, "role": "boss"}]},
      {"clips": [{**target, "start": 10, "num_frames": 5}]},
      {"clips": [target, {"path": "v.mp4"}]},
      {"clips": [{"path": "v.mp4"}]},
      {"clips": [{"path": 7}]},
      {"clips": [{**target, "start": -1}]},
    )
    expected = [
      "line 1",
      "unknown key 'clip'",
      "no such clip",
      "a clip has no path",
      "1 or 4n + 1 frames, got num_frames 4",
      "context or target, got 'boss'",
      "has 2 frames, but num_frames is 5",
      "targets must come last",
      "needs a target",
      "path must be a string, got 7",
      "start must be at least 0, got -1",
    ]
    for record, message in zip(dropped, expected, strict=True):
      assert message in str(record)

  @pytest.mark.parametrize(
    "name, reason",
    [
      ("caf\u00e9.png", "has this name with its accents in another Unicode form"),
      ("Cafe\u0301/x.png", "in other upper and lower case"),
      ("clips\\a.png", "folders in a path are separated by /, not by a backslash"),
      ("b.png", "no such clip: .*/b.png$"),
    ],
  )
  def test_files_of_nearly_the_name(self, tmp_path, name, reason):
    write_image(tmp_path / "cafe\u0301.png")  # as macOS has it
    (tmp_path / "cafe\u0301").mkdir()
    clips = [{"path": name}, {"path": name, "role": "target"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"clips": clips}))
    _, (dropped,) = open_manifest(str(tmp_path / "m.jsonl"), FORM, draw_options())
    assert re.search(reason, dropped.reason), dropped
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
    _, (dropped,) = open_metadata(str(tmp_path), FORM, draw_options())
    assert re.search(reason.replace("clip:", "file:"), dropped.reason), dropped

  def test_clips_of_two_videos_are_aligned_in_time(self, tmp_path):
    """However their frames fall: time begins with each file, so no fraction of a frame is lost at the start."""
    write_video(tmp_path / "a.mp4", 28)
    write_video(tmp_path / "b.mp4", 35, fps=10)
    clips = [{"path": name, "start": 3, "num_frames": 5} for name in ("a.mp4", "b.mp4", "a.mp4", "b.mp4")]
    clips[-1]["role"] = "target"
    sentences, dropped = self.write(tmp_path, {"clips": clips}, form=dataclasses.replace(FORM, fps=6.4))
    assert not dropped
    for clip, rate in zip(sentences[0].clips, (8, 10, 8, 10)):
      assert read_greys(clip) == [8 * int((3 + n) * rate / 6.4) for n in range(5)]

  def test_clips_of_a_video_are_aligned_at_another_rate(self, tmp_path):
    """Frames are counted at that rate, and each clip is resampled from the one shown at its start."""
    write_video(tmp_path / "v.mp4", 28)
    starts = {0: 0, 6: 7, 11: 13, 17: 21}  # 17 at 6.4 is 21.25 at 8 frames per second
    clips = [{"path": "v.mp4", "start": start} for start in starts]
    clips[-1]["role"] = "target"
    sentences, dropped = self.write(tmp_path, {"clips": clips}, form=dataclasses.replace(FORM, fps=6.4))
    assert not dropped
    expected = [[8 * (first + n) for n in (0, 1, 2, 3, 5)] for first in starts.values()]
    assert [read_greys(clip) for clip in sentences[0].clips] == expected
    assert [read_greys(footage.clip(5)) for footage in sentences.records[0].footage] == expected

  def test_pairs_that_are_not_aligned_are_named(self, tmp_path):
    """As those of a folder of pairs are; first frames show the same at any rate."""
    for name, rate in (("fast.mp4", 30), ("slow.mp4", 15), ("untimed.npy", 1)):
      write_clip(tmp_path / name, np.zeros((20, 32, 48, 3), np.uint8), fps=rate)
    write_image(tmp_path / "square.png", size=(40, 40))
    write_image(tmp_path / "wide.png", size=(32, 48))
    lines = [
      {"clips": [{"path": source}, {"path": target, "role": "target"} | extra]}
      for source, target, extra in (
        ("fast.mp4", "slow.mp4", {}),
        ("fast.mp4", "slow.mp4", {"num_frames": 1}),
        ("slow.mp4", "untimed.npy", {}),
        ("square.png", "wide.png", {}),
      )
    ]
    rates = "fast.mp4 and slow.mp4: the source has 30 frames per second and the target 15: set config.data.fps"
    untimed = "slow.mp4 and untimed.npy: the source is resampled from 15 to config.data.fps = 10 frames per second"
    aspect = "square.png and wide.png: the source is 40 x 40 and the target 48 x 32 (width x height): cropped"
    for fps, expected in ((0, {1: rates, 4: aspect}), (10, {3: untimed, 4: aspect})):
      sentences, dropped = self.write(tmp_path, *lines, form=dataclasses.replace(FORM, fps=fps))
      assert len(sentences.records) == 2
      for (number, reason), record in zip(expected.items(), dropped, strict=True):
        assert str(record).startswith(f"m.jsonl line {number}: {reason}")

  def test_the_length_of_one_video_is_that_of_its_pair(self, tmp_path):
    write_video(tmp_path / "long.mp4", 12)
    write_video(tmp_path / "short.mp4", 6)
    write_image(tmp_path / "i.png", size=(32, 48))
    lines = [
      {"clips": [{"path": source} | given, {"path": target, "role": "target"} | other]}
      for source, given, target, other in (
        ("long.mp4", {"num_frames": 9}, "long.mp4", {}),
        ("long.mp4", {}, "long.mp4", {"num_frames": 9}),
        ("long.mp4", {"num_frames": 9}, "long.mp4", {"num_frames": 5}),
        ("long.mp4", {"num_frames": 1}, "long.mp4", {}),
        ("i.png", {}, "long.mp4", {"num_frames": 9}),
        ("long.mp4", {"num_frames": 9}, "short.mp4", {}),
        ("short.mp4", {}, "long.mp4", {"num_frames": 8}),
      )
    ]
    sentences, dropped = self.write(tmp_path, *lines)
    assert [record.lengths for record in sentences.records] == [(9, 9), (9, 9), (9, 5), (1, 5), (1, 9)]
    assert "short.mp4 has 6 frames, but num_frames of the other clip of the pair is 9" in str(dropped[0])
    assert "long.mp4: a clip must have 1 or 4n + 1 frames, got num_frames 8" in str(dropped[1])

  def test_two_targets_are_no_pair(self, tmp_path):
    """Each has its own length, and both are resized as targets."""
    write_video(tmp_path / "long.mp4", 12)
    write_video(tmp_path / "short.mp4", 6)
    targets = [{"path": "long.mp4", "role": "target", "num_frames": 9}, {"path": "short.mp4", "role": "target"}]
    line = {"task": "labels", "clips": [{"path": "long.mp4"}, {"path": "long.mp4"}, *targets]}
    sentences, dropped = self.write(tmp_path, line, kinds={"labels": TargetKind.SEGMENTATION})
    (record,) = sentences.records
    assert not dropped and record.lengths == (5, 5, 9, 5)
    mixes = [part.form.resample == Resampling.BICUBIC for part in record.footage]
    assert mixes == [True, False, False, False]

  def test_null_is_absent(self, tmp_path):
    write_video(tmp_path / "v.mp4", 12)
    target = {"path": "v.mp4", "role": "target", "start": None, "num_frames": None}
    source = {"path": "v.mp4", "role": None}
    sentences, dropped = self.write(tmp_path, {"clips": [source, target], "prompt": None, "task": None})
    assert not dropped and (sentences[0].prompt, sentences[0].task) == ("", "")
    assert sentences[0].roles == (Role.CONTEXT, Role.TARGET) and read_lengths(sentences[0]) == [5, 5]

  @pytest.mark.parametrize(
    "keys, message",
    [
      ('"prompt": NaN', "prompt must be a string, got nan"),
      ('"prompt": ["x"]', "prompt must be a string, got ['x']"),
      ('"task": 7', "task must be a string, got 7"),
      (r'"prompt": "\ud800"', "prompt has half of a surrogate pair"),
      (r'"task": "\udfff x"', "task has half of a surrogate pair"),
      ('"task": "a", "task": "b"', "the key 'task' appears twice"),
      ('"context": "II"', "unknown key 'context'; there are clips, prompt, task"),
    ],
  )
  def test_values_that_are_no_texts(self, tmp_path, keys, message):
    write_image(tmp_path / "i.png")
    clips = json.dumps([{"path": "i.png"}, {"path": "i.png", "role": "target"}])
    sentences, dropped = self.write(tmp_path, f'{{"clips": {clips}, {keys}}}')
    assert not sentences.records and dropped[0].record == "m.jsonl line 1" and message in dropped[0].reason

  @pytest.mark.parametrize(
    "keys, message",
    [
      ('"start": true', "v.mp4: start must be a whole number, got True"),
      ('"num_frames": true', "v.mp4: num_frames must be a whole number, got True"),
      ('"start": 1, "start": 2', "the key 'start' appears twice"),
    ],
  )
  def test_values_of_clips(self, tmp_path, keys, message):
    write_video(tmp_path / "v.mp4", 12)
    sentences, dropped = self.write(tmp_path, f'{{"clips": [{{"path": "v.mp4", "role": "target", {keys}}}]}}')
    assert not sentences.records and message in dropped[0].reason

  def test_targets_are_resized_as_their_kind_asks(self, tmp_path):
    """Of every pair, by the task of the line; a map of two labels has two colours after resizing."""
    board = np.random.default_rng(0).integers(0, 2, (6, 8)).repeat(5, 0).repeat(5, 1) * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "i.png")
    clips = [{"path": "i.png"}] * 3
    lines = [
      {"clips": [*clips, {"path": "i.png", "role": "target"}], "task": "labels"},
      {"clips": [*clips, {"path": "i.png", "role": "target"}]},
      {"clips": [{"path": "i.png", "role": "target"}], "task": "labels"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"data.manifest": str(tmp_path / "m.jsonl"), "data.height": 16, "data.width": 24, "data.held_out": 0}
    source = open_data(override(tiny(), data | {"data.kinds": {"labels": "segmentation"}})).sources["manifest"]
    sentences = [source[index] for index in range(3)]
    keeps = {each.record: [len(np.unique(read_frames(clip))) == 2 for clip in each.clips] for each in sentences}
    assert keeps == dict(
      zip([f"m.jsonl line {number}" for number in (1, 2, 3)], [[False, True, False, True], [False] * 4, [True]])
    )

  @pytest.mark.parametrize("example, is_shown", [("t2", True), ("t3", False), ("s2", False)])
  def test_held_out_targets_that_training_shows_are_counted(self, tmp_path, caplog, example, is_shown):
    """Lines are held out, not clips: the third of five, whose target is an example of the first, or is not."""
    for index in range(5):
      for part in "st":
        write_image(tmp_path / f"{part}{index}.png", shade=40 * index)
    lines = [[f"s{i}", example if i == 0 else f"t{i}", f"s{i}", f"t{i}"] for i in range(5)]
    clips = [
      [{"path": f"{name}.png"} | ({"role": "target"} if k == 3 else {}) for k, name in enumerate(line)]
      for line in lines
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"clips": each}) for each in clips))
    config = override(tiny(), {"data.manifest": str(tmp_path / "m.jsonl"), "data.held_out": 0.2})
    open_data(config).report(config.data)
    text = "data: manifest, training shows the targets of 1 of the 1 held-out records in other records"
    assert (text in caplog.text) == is_shown and ("held-out records" in caplog.text) == is_shown

  @pytest.mark.parametrize("start, count", [(3, 1), (0, 0), (4, 0)])
  def test_other_frames_of_a_target_are_not_the_target(self, tmp_path, start, count):
    write_video(tmp_path / "v.mp4", 12)
    target = {"path": "v.mp4", "start": 3, "role": "target"}
    starts = (7, 3), (6, start)
    lines = [{"clips": [{"path": "v.mp4", "start": first}, target | {"start": last}]} for first, last in starts]
    sentences, dropped = self.write(tmp_path, *lines)
    assert not dropped
    held_out, training = (dataclasses.replace(sentences, records=[record]) for record in sentences.records)
    assert count_shown_targets(held_out, training) == count

  def test_clips_are_not_reversed(self, tmp_path):
    """Lines say which clips are targets, whatever share of other sentences is reversed."""
    for index in range(4):
      write_image(tmp_path / f"{index}.png", shade=40 * index)
    clips = [{"path": f"{index}.png"} for index in range(4)]
    clips[-1]["role"] = "target"
    (tmp_path / "m.jsonl").write_text(json.dumps({"clips": clips}))
    sentences, _ = open_manifest(str(tmp_path / "m.jsonl"), FORM, draw_options(reverse_probability=1.0))
    assert [read_greys(clip)[0] for clip in sentences[0].clips] == [0, 40, 80, 120] and not sentences[0].reverse

  @pytest.mark.parametrize(
    "clip, reason", [({"start": 10}, "has 2 frames from 10 on, too few for a video"), ({}, None)]
  )
  def test_a_video_that_ends_early_is_no_image(self, tmp_path, clip, reason):
    """Unless that was asked for: an image next to a video is a pair of context IV."""
    write_video(tmp_path / "v.mp4", 12)
    line = {"clips": [{"path": "v.mp4"} | clip, {"path": "v.mp4", "role": "target"}]}
    sentences, dropped = self.write(tmp_path, line)
    assert [part.reason for part in dropped] == (
      [f"v.mp4 {reason}, and its pair is one: with num_frames = 1 it is an image"] if reason else []
    )
    line["clips"][0] |= {"num_frames": 1}
    sentences, dropped = self.write(tmp_path, line)
    assert not dropped and [clip.num_frames for clip in sentences[0].clips] == [1, 5]
    write_video(tmp_path / "short.mp4", 3)
    line["clips"] = [{"path": "v.mp4", "num_frames": 1}, {"path": "short.mp4", "role": "target"}]
    sentences, dropped = self.write(tmp_path, line)
    assert not dropped and [clip.num_frames for clip in sentences[0].clips] == [1, 1], "next to an image it is one"

  def test_a_sentence_over_several_lines_is_explained(self, tmp_path):
    _, dropped = self.write(tmp_path, '{"clips": [', '{"path": "v.mp4", "role": "target"}]}')
    assert all("a line must be a whole sentence in JSON" in part.reason for part in dropped) and len(dropped) == 2


class TestTFDS:
  CONFIG = TFDSConfig(
    name="scenes", task="segmentation map", source="image", target="labels", kind=TargetKind.SEGMENTATION
  )

  def open(self, data_dir, **changes):
    config = TFDSConfig(**(vars(self.CONFIG) | {"data_dir": data_dir} | changes))
    return open_tfds(config, config.split, FORM, draw_options(contexts={"II": 1.0}), depth_range=(1.0, 2.0))

  def test_labels_and_depth(self, tmp_path):
    data_dir = write_tfds(tmp_path)
    sentences, dropped = self.open(data_dir)
    assert not dropped and len(sentences.pairs) == 8
    sentence = sentences[3]
    assert sentence.task == "segmentation map" and read_lengths(sentence) == [1] * 4
    colors = [tuple(read_frames(clip)[0, 8, 8]) for clip in sentence.clips[1::2]]
    assert set(colors) <= {tuple(label_colors(np.array(i))) for i in range(8)} and colors[0] != colors[1]
    depth, _ = self.open(data_dir, target="depth", kind=TargetKind.DEPTH)
    target = read_frames(depth[0].clips[1])
    assert target[0, 0, 0, 0] > 240 and target[0, -1, -1, 0] < 15
    held_out, unusable = depth.split(0.5)[0].with_test_set(depth)
    assert not unusable
    assert [held_out[i].clips[-1].key for i in range(8)] == [pair.target.clip(1).key for pair in depth.pairs]
    for index in range(len(held_out)):
      assert held_out[index].clips[0].key != held_out[index].clips[2].key, "no query is its own example"
    with pytest.raises(UserError, match="has no feature 'mask'; there are"):
      self.open(data_dir, target="mask")
    with pytest.raises(UserError, match="TFDS has no nothing with split train here"):
      self.open(data_dir, name="nothing")

  def test_clips_are_identified_by_their_content(self, tmp_path):
    """A data set that was made again has other clips, whatever its name; a part of a split has those of the split."""
    whole, part = (self.open(write_tfds(tmp_path / "one"), split=split)[0] for split in ("train", "train[2:5]"))
    again, _ = self.open(write_tfds(tmp_path / "two", seed=1))
    assert [pair.name for pair in part.pairs] == [pair.name for pair in whole.pairs][2:5]
    assert [pair.source.clip(1).key for pair in part.pairs] == [pair.source.clip(1).key for pair in whole.pairs][2:5]
    assert not {pair.source.clip(1).key for pair in whole.pairs} & {pair.source.clip(1).key for pair in again.pairs}
    held_out, _ = whole.with_test_set(part)
    before, now = (fingerprint({"tfds": source}, {"tfds": held_out}) for source in (whole, again))
    assert find_shared(before, before) == [f"segmentation map/{pair.name}" for pair in part.pairs]
    assert "tfds had 8 records and has 8; changed: segmentation map/train.arr" in describe_changes(before, now)[0]
    assert not find_shared(now, before)
    for index in range(len(held_out)):
      clips = held_out[index].clips
      assert not np.array_equal(read_frames(clips[0]), read_frames(clips[-2])), "no query is its own example"

  def test_examples_are_decoded_once_when_opened_and_checked_when_read(self, tmp_path, monkeypatch):
    data_dir = write_tfds(tmp_path)
    tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
    source = tensorflow_datasets.data_source("scenes", split="train", data_dir=data_dir)
    shift, read = 0, []

    class Source:
      dataset_info = source.dataset_info

      def __getitem__(self, index):
        read.append(index)
        return source[(index + shift) % 8]

    monkeypatch.setattr(tensorflow_datasets, "data_source", lambda *args, **options: Source())
    sentences, _ = self.open(data_dir)
    assert read == list(range(8))
    footage = sentences.pairs[3].source
    assert np.array_equal(footage.read(1)[0], source[3]["image"])
    shift = 1
    with pytest.raises(
      UserError, match=r"example 3 of scenes/1\.0\.0, split train changed while it was in use: start ag"
    ):
      footage.clip(1).read()

  @pytest.mark.parametrize(
    "rates, fps, reason",
    [
      ((30, 15), 0, "the source has 30 frames per second and the target 15: set config.data.fps"),
      ((30, 15), 15, ""),
      ((30, None), 10, "the source is resampled from 30 to config.data.fps = 10 frames per second"),
      ((None, None), 10, ""),
    ],
  )
  def test_rates_of_mp4s(self, tmp_path, monkeypatch, rates, fps, reason):
    tensorflow_datasets = pytest.importorskip("tensorflow_datasets")

    def make_value(rate):
      frames = np.stack([np.full((32, 48, 3), 240 * i // (rate or 30), np.uint8) for i in range(rate or 30)])
      if not rate:
        return frames
      write_clip(tmp_path / "v.mp4", frames, fps=rate)
      return (tmp_path / "v.mp4").read_bytes()

    example = dict(zip(("image", "labels"), map(make_value, rates)))
    part = SimpleNamespace(filename="scenes-train.array_record-00000-of-00001", skip=0, take=2)
    info = SimpleNamespace(name="scenes", full_name="scenes/1.0.0", features=example)
    info.splits = {"train": SimpleNamespace(file_instructions=[part])}

    class Source(UserList):
      dataset_info = info

    monkeypatch.setattr(tensorflow_datasets, "data_source", lambda *args, **options: Source([example] * 2))
    form, config = dataclasses.replace(FORM, fps=fps), TFDSConfig(**(vars(self.CONFIG) | {"kind": TargetKind.IMAGE}))
    options = draw_options(contexts={"I": 1.0})
    sentences, dropped = open_tfds(config, "train", form, options, depth_range=(1.0, 2.0))
    assert reason in str(dropped[:1]) and bool(dropped) == bool(reason)
    if not reason:
      source, target = sentences[0].clips[:2]
      assert read_greys(source) == read_greys(target) and len(set(read_greys(source))) == 5

  def test_features_become_frames(self):
    def frames(value, kind):
      return feature_to_frames(value, kind, (0.5, 10.0))

    assert frames(np.zeros((4, 5), np.uint8), TargetKind.IMAGE).shape == (1, 4, 5, 3)
    assert frames(np.zeros((7, 4, 5, 3), np.uint8), TargetKind.IMAGE).shape == (7, 4, 5, 3)
    assert frames(np.eye(4, dtype=bool), TargetKind.SALIENCY)[0, :, 0, 0].tolist() == [255, 0, 0, 0]
    normals = np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    assert frames(normals, TargetKind.NORMALS).tolist() == [[[[128, 128, 255], [0, 0, 0]]]]
    assert frames(normals.astype(np.float16) * np.nan, TargetKind.NORMALS).max() == 0, "unknown"
    with pytest.raises(UserError, match="images must be uint8"):
      frames(np.zeros((4, 5, 3)), TargetKind.IMAGE)
    with pytest.raises(UserError, match="cannot be a camera movement"):
      frames(np.zeros((4, 5, 3)), TargetKind.CAMERA)

  def test_images_with_alpha_are_shown_over_white(self):
    pixels = np.array([[[10, 200, 30, 255], [10, 200, 30, 0], [0, 0, 0, 128]]], np.uint8)
    for value in (pixels, np.stack([pixels, pixels])):
      for frame in feature_to_frames(value, TargetKind.IMAGE, (0.5, 10.0)):
        assert frame.tolist() == [[[10, 200, 30], [255] * 3, [127] * 3]]

  @pytest.mark.parametrize(
    "value, kind, message",
    [
      (np.zeros((4, 5, 2), np.uint8), "image", r"1, 3 or 4 channels, and the feature of shape \(4, 5, 2\) has 2"),
      (np.zeros((7, 4, 5), np.uint8), "image", r"1, 3 or 4 channels, and the feature of shape \(7, 4, 5\) has 5"),
      (np.zeros((4, 5, 3), np.uint8), "normals", "vectors in floating point with 3 channels, got uint8 with 3"),
      (np.zeros((4, 5, 1), np.float32), "normals", "vectors in floating point with 3 channels, got float32 with 1"),
      (np.zeros((4, 5, 3), np.uint8), "segmentation", "labels must be integers with 1 channel, got uint8 with 3"),
      (np.zeros((4, 5), np.float32), "segmentation", "labels must be integers with 1 channel, got float32 with 1"),
      (np.zeros((4, 5), np.uint16), "depth", "must be metres in floating point with 1 channel, got uint16 with 1"),
      (np.zeros((4, 5, 3)), "depth", "got float64 with 3: convert them, or if they are pictures, set config"),
    ],
  )
  def test_features_of_another_form_are_refused(self, value, kind, message):
    with pytest.raises(UserError, match=message):
      feature_to_frames(value, TargetKind(kind), (0.5, 10.0))

  def test_refused_features_are_named(self, tmp_path):
    data_dir = write_tfds(tmp_path)
    _, dropped = self.open(data_dir, kind=TargetKind.NORMALS)
    assert str(dropped[0]).startswith("scenes 0: the feature 'labels': normals must be vectors in floating point")
    sentences, _ = self.open(data_dir, target="image", kind=TargetKind.IMAGE)
    assert sentences.pairs[0].target.form.resample == Resampling.BICUBIC
    data = {"data.tfds": {"name": "scenes", "data_dir": data_dir, "task": "t", "source": "image", "target": "image"}}
    source = open_data(override(tiny(), data | {"data.kinds": {"t": "depth"}})).sources["tfds"]
    assert {pair.target.form.resample for pair in source.pairs} == {Resampling.NEAREST}, "pictures of depth"


@pytest.mark.parametrize(
  "kinds, changes, expected",
  [
    ([ComputedSentences, GridSentences], {"buckets": ["16x32"], "fit": "pad"}, ["buckets and fit have"]),
    ([ComputedSentences, PairSentences], {"buckets": ["16x32"], "fit": "pad"}, []),
    ([ARCSentences], {}, []),
    ([ListedSentences, ARCSentences], {"num_clips.clips_6": 0.5, "buckets": ["16x32"]}, ["num_clips has"]),
    ([ListedSentences], {"num_clips.clips_4": 2.0}, []),
    ([ListedSentences, PairSentences], {"num_clips.clips_6": 0.5}, []),
    ([list], {"num_clips.clips_6": 0.5, "buckets": ["16x32"], "fit": "pad"}, []),
    ([], {"buckets": ["16x32"]}, []),
  ],
)
def test_keys_that_no_source_uses_are_reported(kinds, changes, expected):
  """Of sources of your own nothing is known."""
  config = override(tiny(), {f"data.{key}": value for key, value in changes.items()}).data
  lines = list(describe_unused_keys(config, [kind.__new__(kind) for kind in kinds]))
  assert [line.partition(" no effect: ")[0] for line in lines] == [f"config.data.{text}" for text in expected]


def test_keys_without_effect_are_reported_at_the_start(caplog):
  config = override(tiny(), {"data.fit": "pad"})
  open_data(config).report(config.data)
  assert "data: config.data.fit has no effect: computed tasks, grids and ARC have clips of one size" in caplog.text
