"""Opening the data of a run, and encoding it in advance."""

import dataclasses
import json
import re

import numpy as np
import pytest
from etils import epath

from tests.clip_files import write_metadata, write_pairs, write_table, write_video
from tests.commands import finish, free_port, run_command, run_here, start_command, start_python
from tests.helpers import image_width
from tests.stand_ins import CountingEncoders, Shape
from tests.test_checksums import flip_bit
from univid_jax.cli.preview import draw_preview
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import read_frames
from univid_jax.data import progress
from univid_jax.data.cache.entries import is_intact
from univid_jax.data.features import FeatureCaches, FeatureMaker
from univid_jax.data.media.reader import read_clip
from univid_jax.data.prepare import PreparationReport, prepare
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources.computed import ComputedSentences, LazySentences
from univid_jax.data.sources.open import open_data

CONTEXTS = {f"data.contexts.{name}": 0.25 for name in ("I", "II", "III", "IV")}
ROWS = RowShape(num_tokens=400, num_text_tokens=8, num_slots=2)
SMALL = {"data.height": 16, "data.width": 24, "data.variants": 6, **CONTEXTS}


@pytest.fixture
def metadata(tmp_path):
  return write_metadata(tmp_path / "metadata")


@pytest.fixture
def pairs(tmp_path):
  return write_pairs(tmp_path / "pairs")


def test_the_preview_shows_all_kinds_of_data_and_tasks_in_turn(metadata, pairs, tmp_path, monkeypatch):
  """In order of their numbers the first sentences are all of the first task."""
  shown = []
  monkeypatch.setattr("univid_jax.cli.preview.contact_sheet", lambda path, rows: (shown.extend(rows), path.touch()))
  changes = {"data.metadata": str(metadata), "data.pairs": str(pairs), "data.folder": str(metadata / "train")}
  draw_preview(open_data(override(tiny(), SMALL | changes | {"data.held_out": 0.0})), 9, str(tmp_path))
  assert [name for name, _ in shown] == ["metadata", "pairs", "computed"] * 3
  assert [sentence.task for name, sentence in shown if name == "pairs"] == ["depth map", "edges", "depth map"]
  assert len({sentence.task for name, sentence in shown if name == "computed"}) == 3


def test_another_base_than_the_preset_is_for_is_refused_before_the_data_are_read(checkpoint, tmp_path, capfd):
  arguments = [f"--config.init_from={checkpoint}", f"--config.data.pairs={tmp_path / 'missing'}"]
  assert run_here("univid_jax.prepare", "--config=wan_1_3b", *arguments, f"--workdir={tmp_path / 'run'}") == 1
  assert "another shape; --config.model.variant= takes the base's" in capfd.readouterr().err


class TestOpenData:
  def test_all_kinds_of_data(self, metadata, pairs, tmp_path):
    changes = {"data.metadata": str(metadata), "data.pairs": str(pairs), "data.weights.pairs": 2.0}
    data = open_data(override(tiny(), SMALL | changes | {"data.held_out": 0.5}))
    assert list(data.sources) == ["metadata", "pairs"] and data.weights == {"metadata": 1.0, "pairs": 2.0}
    assert len(data.sources["metadata"]) == len(data.held_out["metadata"]) == 6
    assert data.task_names == ("depth map", "edges") and not data.dropped

  def test_without_data_of_ones_own_tasks_are_computed(self, tmp_path):
    data = open_data(tiny())
    assert isinstance(data.sources["computed"], ComputedSentences)
    assert isinstance(data.held_out["computed"], ComputedSentences)
    data = open_data(override(tiny(), {"init_from": "base"}))
    assert isinstance(data.sources["computed"], LazySentences)
    assert isinstance(data.held_out["computed"], ComputedSentences)

  def test_no_data_is_an_error(self, tmp_path):
    with pytest.raises(UserError, match=r"there is no data: give config\.data\.folder"):
      open_data(override(tiny(), {"data.bundled": False}))
    write_table(tmp_path, [("gone.mp4", "x")])
    with pytest.raises(UserError, match=r"nothing in config\.data\.metadata can be used: .*gone\.mp4"):
      open_data(override(tiny(), {"data.metadata": str(tmp_path)}))

  def test_unknown_contexts_are_an_error(self, pairs, tmp_path):
    with pytest.raises(UserError, match="unknown context 'V'"):
      open_data(override(tiny(), {"data.pairs": str(pairs), "data.contexts.V": 1.0}))

  def test_dropped_records_have_to_be_allowed(self, metadata, tmp_path, caplog):
    write_table(metadata, [("one é.mp4", "x"), ("gone.mp4", "x")])
    config = override(tiny(), SMALL | {"data.metadata": str(metadata)})
    data = open_data(config)
    with caplog.at_level("INFO", "univid_jax"):
      data.report(config.data)
    assert "data: metadata, 6 sentences, drawn with weight 1" in caplog.text
    assert "dropped: metadata.csv line 3 (gone.mp4)" in caplog.text
    with pytest.raises(UserError, match=r"1 listed record cannot be used: metadata\.csv line 3"):
      data.require_usable(config.data)
    data.require_usable(dataclasses.replace(config.data, allow_dropped=True))

  @pytest.mark.parametrize("kind", ["metadata", "pairs", "test_pairs", "computed", "grids"])
  def test_held_out_sentences_have_their_prompts(self, metadata, pairs, kind):
    """And are otherwise those of a run that drops none."""
    given = {"metadata": {"metadata": metadata}, "pairs": {"pairs": pairs}}.get(kind, {})
    if kind == "test_pairs":
      given = {"pairs": pairs, "test_pairs": pairs}
    if kind == "grids":
      given = {"weights.computed": 0.0, "grids.families.maze": 1.0, "grids.cell": 1}
    changes = {
      f"data.{key}": str(value) if "pairs" in key or key == "metadata" else value for key, value in given.items()
    }
    config = override(tiny(), SMALL | changes | {"data.prompt": "detailed", "data.held_out": 0.5})
    kept, dropping = (open_data(override(config, {"data.prompt_dropout": share})) for share in (0.0, 1.0))
    (training,) = dropping.sources.values()
    (expected,), (held_out,) = kept.held_out.values(), dropping.held_out.values()
    assert not any(training[index].prompt for index in range(3))
    for one, other in zip(*([source[index].with_frames() for index in range(3)] for source in (expected, held_out))):
      assert one.prompt == other.prompt != "" and all(map(np.array_equal, one.clips, other.clips))


I2V = Shape(takes_condition=True, takes_image_features=True)
I2V22 = Shape(takes_condition=True)


class TestPrepare:
  """After `prepare`, training features need no encoder."""

  def open(self, config, workdir, shape, **options):
    config = override(config, {"init_from": "base", "data.prompt": "detailed", "data.prompt_dropout": 0.3})
    encoders = CountingEncoders(**options)
    data = open_data(config)
    caches = FeatureCaches.open(config, encoders, workdir)
    features = FeatureMaker(encoders, shape=shape, task_names=data.task_names, caches=caches)
    return encoders, data, features

  def configure(self, kind, tmp_path):
    changes = {"data.num_clips.clips_6": 1.0, "data.reverse_probability": 0.4, "data.num_sentences": 12}
    if kind != "computed":
      write = {"metadata": write_metadata, "pairs": write_pairs}[kind]
      changes[f"data.{kind}"] = str(write(tmp_path / kind))
    return override(tiny(), SMALL | changes)

  @pytest.mark.parametrize("shape", [Shape(), I2V, I2V22], ids=["t2v", "wan2.1 i2v", "wan2.2 i2v"])
  @pytest.mark.parametrize("kind", ["computed", "metadata", "pairs"])
  def test_training_needs_no_encoder(self, tmp_path, kind, shape):
    encoders, data, features = self.open(self.configure(kind, tmp_path), tmp_path, shape)
    done = prepare(features, data, row_shape=ROWS)
    assert done.num_clips == done.num_encoded > 0
    assert encoders.most_loaded == 1 and not encoders.loaded
    assert encoders.calls["clip"] >= done.num_clips and (encoders.calls["image"] > 0) == shape.takes_image_features
    encoders.calls.clear()
    for source in data.sources.values():
      for index in range(len(source)):
        made = features(source[index])
        assert (made.condition is not None) == shape.takes_condition
        assert (made.image_features is not None) == shape.takes_image_features
    assert not encoders.calls and not encoders.loaded

  @pytest.mark.parametrize("stride", [1, 2])
  def test_conditions_have_the_frames_of_the_codec(self, tmp_path, stride):
    """That has another stride than the published ones; the conditions of their stride would be of no use."""
    encoders, data, features = self.open(self.configure("pairs", tmp_path), tmp_path, I2V22, temporal_stride=stride)
    prepare(features, data, row_shape=RowShape(num_tokens=2000, num_text_tokens=8, num_slots=2))
    encoders.calls.clear()
    for index in range(len(data.sources["pairs"])):
      features(data.sources["pairs"][index])
    assert not encoders.calls

  def test_the_features_are_those_without_caches(self, tmp_path):
    encoders, data, features = self.open(self.configure("pairs", tmp_path), tmp_path, I2V)
    prepare(features, data, row_shape=ROWS)
    plain = FeatureMaker(encoders, shape=features.shape, task_names=features.task_names)
    for index in range(10):
      sentence = data.sources["pairs"][index]
      cached, encoded = features(sentence).arrays(), plain(sentence.with_frames()).arrays()
      assert cached.keys() == encoded.keys() and all(np.array_equal(cached[name], encoded[name]) for name in cached)

  def test_a_second_time_encodes_nothing(self, tmp_path):
    config = self.configure("metadata", tmp_path)
    _, data, features = self.open(config, tmp_path, I2V)
    first = prepare(features, data, row_shape=ROWS)
    encoders, data, features = self.open(config, tmp_path, I2V)
    assert prepare(features, data, row_shape=ROWS) == PreparationReport(first.num_clips, 0)
    assert not encoders.calls and encoders.most_loaded == 0, "not even a codec is loaded"

  def test_a_damaged_entry_is_encoded_again(self, tmp_path, caplog):
    config = self.configure("metadata", tmp_path)
    _, data, features = self.open(config, tmp_path, I2V)
    first = prepare(features, data, row_shape=ROWS)
    for cache in ("latents", "prompts", "images"):
      flip_bit(next((tmp_path / "cache" / cache).rglob("*.safetensors")))
    again = prepare(features, data, row_shape=ROWS, verify=True)
    assert sum(message.endswith("is corrupt and is computed again") for message in caplog.messages) == 3
    assert again.num_clips == first.num_clips
    assert prepare(features, data, row_shape=ROWS, verify=True).num_encoded == 0
    assert all(is_intact(epath.Path(path)) for path in (tmp_path / "cache").rglob("*.safetensors"))

  def test_processes_share_the_work(self, tmp_path, monkeypatch):
    config = self.configure("pairs", tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for name in ("prepare.wait_for_processes", "sources.base.sum_over_processes"):
      monkeypatch.setattr(f"univid_jax.data.{name}", lambda value: value)
    counts = []
    for process in (0, 1):
      monkeypatch.setattr("jax.process_index", lambda process=process: process)
      encoders, data, features = self.open(config, tmp_path, I2V)
      counts.append(prepare(features, data, row_shape=ROWS))
    assert counts[0].num_clips == counts[1].num_clips == sum(count.num_encoded for count in counts)
    assert abs(counts[0].num_encoded - counts[1].num_encoded) <= 1
    encoders.calls.clear()
    for index in range(len(data.sources["pairs"])):
      features(data.sources["pairs"][index])
    assert not encoders.calls

  def test_clips_of_one_shape_are_encoded_together(self, tmp_path):
    """As many as the codec takes; what is left over, and what stays when one cannot be read, by themselves."""
    config = self.configure("metadata", tmp_path)
    _, data, features = self.open(config, tmp_path / "alone", Shape())
    alone = prepare(features, data, row_shape=ROWS)
    encoders, data, together = self.open(config, tmp_path / "together", Shape(), num_parallel=3)
    assert prepare(together, data, row_shape=ROWS) == alone
    assert encoders.calls["clip"] == alone.num_clips
    assert alone.num_clips / 3 <= encoders.calls["together"] < alone.num_clips / 2
    for index in range(len(data.sources["metadata"])):
      sentence = data.sources["metadata"][index]
      for clip in sentence.clips:
        assert np.array_equal(together.encode_clip(clip), features.encode_clip(clip))

  def test_a_sentence_is_computed_once_for_clips_encoded_together(self, tmp_path, monkeypatch):
    config = override(self.configure("computed", tmp_path), {"data.contexts.II": 1.0, "data.contexts.I": 0.0})
    _, data, features = self.open(config, tmp_path, Shape(), num_parallel=8)
    computed, compute = [], ComputedSentences.__getitem__

    def count(self, index):
      computed.append(index)
      return compute(self, index)

    monkeypatch.setattr(ComputedSentences, "__getitem__", count)
    prepare(features, data, row_shape=ROWS)
    images = [index for index in range(12) if data.sources["computed"][index].context == "II"]
    assert images and all(computed.count(index) == 1 for index in images)

  def test_a_clip_that_cannot_be_read_is_named_among_those_encoded_together(self, tmp_path):
    config = self.configure("pairs", tmp_path)
    encoders, data, features = self.open(config, tmp_path, Shape(), num_parallel=3)
    references = {clip.key: clip for index in range(12) for clip in data.sources["pairs"][index].clips}
    path = sorted((tmp_path / "pairs").rglob("source.*"))[0]
    path.write_bytes(path.read_bytes()[:40])
    done = prepare(features, data, row_shape=ROWS, allow_dropped=True)
    assert done.dropped and all(path.parent.name in each.record for each in done.dropped)
    missing = {key for key in references if features.caches.latents.get(key) is None}
    assert missing and done.num_clips == len(references)
    assert done.num_encoded == encoders.calls["clip"] == done.num_clips - len(missing)

  def test_reports_rate_and_time_left(self, tmp_path, monkeypatch, caplog):
    config = self.configure("pairs", tmp_path)
    _, data, features = self.open(config, tmp_path, I2V)
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    with caplog.at_level("INFO", "univid_jax"):
      done = prepare(features, data, row_shape=ROWS)
    total = len(data.sources["pairs"])
    lines = [line for line in caplog.messages if line.startswith("clips: ")]
    assert re.fullmatch(rf"clips: {total} of {total} sentences, \d+ done \([\d.e+]+ clips/s\), 00:00 left", lines[-1])
    assert f"{done.num_encoded} done" in lines[-1] or f"{done.num_encoded - 1} done" in lines[-1]

  def test_without_a_base_clips_are_only_read(self, metadata, tmp_path):
    config = override(tiny(), SMALL | {"data.metadata": str(metadata)})
    encoders = CountingEncoders()
    encoders.has_weights = False
    assert FeatureCaches.open(config, encoders, tmp_path) is None
    data = open_data(config)
    features = FeatureMaker(CountingEncoders(), shape=Shape(), task_names=())
    assert prepare(features, data, row_shape=ROWS) == PreparationReport(16)

  def test_frames_and_references_are_encoded_alike(self, metadata, tmp_path):
    """As in sampling, which has frames, uint8 or float in [-1, 1]."""
    data = open_data(override(tiny(), SMALL | {"data.metadata": str(metadata)}))
    features = FeatureMaker(CountingEncoders(), shape=I2V, task_names=())
    clip = data.sources["metadata"][0].clips[0]
    frames = read_frames(clip)
    for same in (frames, frames.astype(np.float32) / 127.5 - 1):
      assert np.array_equal(features.encode_clip(same), features.encode_clip(clip))
      for a, b in zip(features.image_inputs(same, 3), features.image_inputs(clip, 3)):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  pytest.importorskip("torch", reason="the release has PyTorch files; needs the extra `convert`")
  from tests.helpers import GOLDENS
  from univid_jax.convert.commands import convert_any

  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(GOLDENS / "tiny_wan"), str(folder))
  return folder


SMALL_WAN = (
  "--config=wan_1_3b",
  "--config.model.variant=",
  "--config.model.dtype=float32",
  "--config.model.param_dtype=float32",
  "--config.data.height=16",
  "--config.data.width=32",
  "--config.data.num_frames=5",
  "--config.rows.num_tokens=48",
  "--config.lora.rank=2",
  "--config.log_every=1",
)


def run(module, *arguments):
  return run_command(module, *SMALL_WAN, *arguments)


@pytest.mark.long
def test_from_data_to_a_lora_for_other_programs(checkpoint, metadata, tmp_path):
  """Prepare, train a LoRA, resume, sample with it, export it: as a user does it."""
  common = [
    f"--config.init_from={checkpoint}",
    f"--config.data.metadata={metadata}",
    f"--workdir={tmp_path / 'run'}",
    "--config.data.variants=8",
  ]
  done = run("univid_jax.prepare", *common)
  assert done.returncode == 0, done.stderr
  assert "16 different clips are ready (16 encoded now)" in done.stdout
  flip_bit(next((tmp_path / "run" / "cache" / "latents").rglob("*.safetensors")))
  done = run("univid_jax.prepare", *common)
  assert "16 different clips are ready (1 encoded now)" in done.stdout
  done = run("univid_jax.train", *common, "--config.num_steps=2")
  assert done.returncode == 0, done.stderr
  done = run("univid_jax.train", *common, "--config.num_steps=4")
  assert done.returncode == 0 and "resuming" in done.stderr and "step 2 of 4" in done.stderr, done.stderr
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 2, 3, 4]
  from univid_jax import load_pipeline
  from univid_jax.checkpoints.lora.reading import read_lora

  clips = [np.random.default_rng(i).integers(0, 255, (5, 16, 32, 3), np.uint8) for i in range(3)]
  whole = load_pipeline(str(tmp_path / "run"), dtype="float32")
  beside = load_pipeline(str(checkpoint), str(tmp_path / "run" / "lora.safetensors"), dtype="float32")
  sampled = [pipe.sample(clips, num_inference_steps=2, prompt="x").latents for pipe in (whole, beside)]
  np.testing.assert_allclose(*sampled, atol=1e-5)
  done = run_command("tools.convert_weights", tmp_path / "run", tmp_path / "out.safetensors", "--to=diffusers")
  assert done.returncode == 0, done.stderr
  lora = read_lora(tmp_path / "out.safetensors")
  assert lora.metadata["step"] == "4" and len(lora.changes) == 30


@pytest.mark.long
def test_long_clips(checkpoint, tmp_path):
  """Four clips of 81 frames: read, encoded, cached, packed, trained on, validated, and sampled for previews."""
  for number in range(2):
    write_video(tmp_path / f"{number}.mp4", 4 * 81, shade=40 * number)
  write_table(tmp_path, [("0.mp4", "first"), ("1.mp4", "second")])
  common = [
    f"--config.init_from={checkpoint}",
    f"--config.data.metadata={tmp_path}",
    f"--workdir={tmp_path / 'run'}",
    "--config.data.height=32",
    "--config.data.num_frames=81",
    "--config.data.variants=1",
    f"--config.rows.num_tokens={4 * 21 * 2 * 2}",
  ]
  done = run("univid_jax.prepare", *common)
  assert done.returncode == 0 and "different clips are ready" in done.stdout, done.stderr
  previews = ["--config.validation.every_steps=1", "--config.validation.sentences=1", "--config.validation.previews=1"]
  fast = ["--config.validation.num_inference_steps=1", "--config.eval.sentences_per_case=0", "--config.num_steps=1"]
  done = run("univid_jax.train", *common, *previews, *fast)
  assert done.returncode == 0, done.stderr
  assert not re.search("warning", done.stderr, re.IGNORECASE), done.stderr
  (preview,) = (tmp_path / "run" / "previews").rglob("*.mp4")
  assert read_clip(preview).frames.shape[0] == 81


@pytest.mark.long
def test_packed_caches(checkpoint, metadata, tmp_path):
  """Two processes encode and pack; training reads shards, and computes a corrupt record again."""
  common = [f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}"]
  packing = [*SMALL_WAN, *common, "--pack", "--remove_files"]
  group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
  arguments = ["univid_jax.prepare", *packing, *group, "--config.mesh.data=2"]
  both = [finish(each) for each in [start_command(*arguments, f"--process_id={index}") for index in (0, 1)]]
  assert [done.returncode for done in both] == [0, 0], both
  assert "16 different clips are ready (16 encoded now)" in both[0].stdout and "ready" not in both[1].stdout, both
  assert re.search(r"entries are in \d shards \((\d+) packed now\), \1 files? removed", both[0].stdout)
  cache = tmp_path / "run" / "cache"
  assert not list(cache.rglob("*.safetensors"))
  shard = next((cache / "latents" / "shards").glob("*.array_record"))
  flip_bit(shard, place=shard.read_bytes().index(b"value"))
  done = run("univid_jax.train", *common, "--config.num_steps=1", "--config.data.variants=8")
  assert done.returncode == 0 and f"{shard}: record 0 is corrupt and is computed again" in done.stderr, done.stderr
  assert len(list(cache.rglob("*.safetensors"))) == 1
  done = run("univid_jax.prepare", *common, "--pack", "--remove_files")
  assert (
    "16 different clips are ready (0 encoded now)" in done.stdout and "(1 packed now), 1 file removed" in done.stdout
  )
  done = run("univid_jax.prepare", *common)
  assert "16 different clips are ready (0 encoded now)" in done.stdout and "corrupt" not in done.stderr


ENCODE = """
import sys
import jax
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.parallel.mesh import make_mesh
from univid_jax.runtime.processes import connect, disconnect, sum_over_processes

base, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
connect(f"127.0.0.1:{port}", 2, index, heartbeat_seconds=60)
mesh = make_mesh({"data": 2})
encoders = PretrainedEncoders(PretrainedCheckpoint.open(base), mesh)
if index:
  for prompt in ("one", "two"):
    assert encoders.embed_prompt(prompt).any()
    encoders.release()
assert sum_over_processes(index + 1) == 3
disconnect()
"""


@pytest.mark.long
def test_a_process_encodes_without_the_others(checkpoint):
  """Each encodes its share, and what turns out to be damaged in its cache."""
  port = free_port()
  both = [start_python("-c", ENCODE, checkpoint, port, index) for index in (0, 1)]
  for done in map(finish, both):
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_unusable_records_end_the_command_unless_allowed(checkpoint, metadata, tmp_path):
  write_table(metadata, [("one é.mp4", "x"), ("gone.mp4", "x")])
  common = [f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}"]
  done = run("univid_jax.prepare", *common)
  assert done.returncode == 1
  assert "1 listed record cannot be used: metadata.csv line 3 (gone.mp4)" in done.stderr
  done = run("univid_jax.prepare", *common, "--allow_dropped")
  assert done.returncode == 0 and "dropped: metadata.csv line 3 (gone.mp4)" in done.stderr
  done = run("univid_jax.prepare", *common, "--allow_dropped", "--preview=2")
  assert done.returncode == 0 and image_width(tmp_path / "run" / "preview.png") > 300


def test_clips_of_a_folder_are_counted(tmp_path, capfd):
  """Those that can be decoded; folders in it are left out, which is said."""
  (tmp_path / "clips" / "more").mkdir(parents=True)
  for name in ("a.mp4", "b.mp4"):
    write_video(tmp_path / "clips" / name, 9)
  where = [f"--config.data.folder={tmp_path / 'clips'}", f"--workdir={tmp_path / 'run'}"]
  assert run_here("univid_jax.prepare", "--config=tiny", *where) == 0
  stdout, stderr = capfd.readouterr()
  assert stdout.startswith("2 different clips can be read, 0 records dropped"), stdout
  assert f"{tmp_path / 'clips'}: 1 folder in it is left out, only its own files are read" in stderr


def test_a_command_without_data(checkpoint, tmp_path, capfd):
  arguments = [*SMALL_WAN, f"--config.init_from={checkpoint}", f"--workdir={tmp_path / 'run'}"]
  capfd.readouterr()
  assert run_here("univid_jax.train", *arguments) == 1
  stderr = capfd.readouterr().err
  assert "there is no data: give config.data.folder" in stderr and len(stderr.strip().splitlines()) == 1, stderr


@pytest.mark.long
def test_two_processes(checkpoint, metadata, tmp_path):
  """Each encodes its share, on devices of its own, also with weights sharded over all; process 0 alone says so."""
  common = [f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}"]
  sizes = ["--config.num_steps=2", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.validation.sentences=2"]
  sampling = ["--config.validation.num_inference_steps=1", "--config.eval.sentences_per_case=0"]
  for command, expected in (("prepare", "16 different clips are ready (16 encoded now)"), ("train", "2 steps in")):
    group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    arguments = [f"univid_jax.{command}", *SMALL_WAN, *common, *sizes, *sampling, *group]
    both = [finish(each) for each in [start_command(*arguments, f"--process_id={index}") for index in (0, 1)]]
    assert [done.returncode for done in both] == [0, 0], both
    lines = [[line for line in (done.stdout + done.stderr).splitlines() if "[Gloo]" not in line] for done in both]
    assert any(expected in line for line in lines[0]) and lines[1] == [], lines
  assert (tmp_path / "run" / "previews").exists() and (tmp_path / "run" / "lora.safetensors").exists()


@pytest.mark.slow
def test_two_commands_fill_one_cache(checkpoint, metadata, tmp_path):
  """At the same time: both end well, and no file is partial."""
  data = (f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}")
  both = [start_command("univid_jax.prepare", *SMALL_WAN, *data) for _ in range(2)]
  for process in both:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "16 different clips are ready" in out, error
  files = list((tmp_path / "run" / "cache" / "latents").rglob("*.*"))
  assert len(files) == 16 and all(path.suffix == ".safetensors" for path in files)
