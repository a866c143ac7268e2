"""Data of one's own: every kind of source, every way in which a row can be wrong, and what is kept of it."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.commands import run_command, start_command
from univid_jax.data.cache import read_frames
from univid_jax.data.clips import ClipFormat
from univid_jax.data.datasets import Drawing, open_manifest, open_metadata, open_pairs
from univid_jax.data.kinds import depth_of, depth_picture, known, label_colors, read_palette
from univid_jax.data.tfds import open_tfds, to_frames
from univid_jax.data.video import fit_clip, write_clip
from univid_jax.types import Role

FORM = ClipFormat(size=(16, 24), num_frames=5)


def drawing(**options):
  defaults = dict(contexts={"I": 1.0, "II": 1.0, "III": 1.0, "IV": 1.0}, num_clips={4: 1.0}, reverse_probability=0.0,
                  prompt="detailed", prompt_dropout=0.0, variants=8, seed=0)
  return Drawing(**(defaults | options))


def video(path, count, *, shade=0, size=(32, 48)):
  """Frame i of a clip is of one grey: shade + 8 i."""
  frames = np.stack([np.full((*size, 3), shade + 8 * i, np.uint8) for i in range(count)])
  write_clip(path, frames, fps=8)
  return path


def greys(clip):
  """The grey of each frame, to the nearest 4."""
  return [int(round(float(frame.mean()) / 4) * 4) for frame in read_frames(clip)]


def lengths(sentence):
  return [len(read_frames(clip)) for clip in sentence.clips]


@pytest.fixture
def metadata(tmp_path):
  """Two rows, one file beside the table and one under train/."""
  (tmp_path / "train").mkdir()
  video(tmp_path / "one é.mp4", 24)
  video(tmp_path / "train" / "two.mp4", 28)
  write_table(tmp_path, [("one é.mp4", "first"), ("two.mp4", "second")])
  return tmp_path


def write_table(folder, rows, header=("file_name", "text")):
  with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([header, *rows])


class TestMetadata:
  def test_quarters_and_contexts(self, metadata):
    """Each clip is the start of its quarter; all four contexts come, with the lengths that they say."""
    sentences, dropped = open_metadata(str(metadata), FORM, drawing())
    assert not dropped and len(sentences) == 16
    seen = {}
    for index in range(16):
      sentence = sentences[index]
      quarter = (6, 7)[index % 2]
      seen[sentence.context] = lengths(sentence)
      assert [greys(clip)[0] for clip in sentence.clips] == [8 * quarter * i // 4 * 4 for i in range(4)]
      assert sentence.prompt == ("first", "second")[index % 2]
      assert sentence.roles == (Role.CONTEXT,) * 3 + (Role.TARGET,)
    assert seen == {"I": [5, 5, 5, 5], "II": [1, 1, 1, 1], "III": [1, 1, 5, 5], "IV": [1, 5, 1, 5]}

  def test_reversed_and_without_prompts(self, metadata):
    backwards, _ = open_metadata(str(metadata / "metadata.csv"), FORM, drawing(reverse_probability=1.0, prompt="null"))
    assert [greys(clip)[0] for clip in backwards[0].clips] == [48, 0, 144, 96]
    assert backwards.prompts() == {""}
    sometimes, _ = open_metadata(str(metadata), FORM, drawing(prompt_dropout=0.5))
    assert 2 <= sum(sometimes[i].prompt == "" for i in range(16)) <= 14

  def test_wrong_rows_are_named(self, metadata):
    video(metadata / "short.mp4", 16)
    whole = (metadata / "one é.mp4").read_bytes()
    (metadata / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (metadata / "empty.mp4").write_bytes(b"")
    (metadata / "text.mp4").write_text("hello")
    (metadata / "notes.txt").write_text("hello")
    write_table(metadata, [("one é.mp4", "x"), ("one é.mp4", "x"), ("short.mp4", "x"), ("cut.mp4", "x"), ("empty.mp4", "x"),
                           ("text.mp4", "x"), ("gone.mp4", "x"), ("notes.txt", "x")])
    sentences, dropped = open_metadata(str(metadata), FORM, drawing())
    assert len(sentences.rows) == 1
    reasons = {row.row: row.reason for row in dropped}
    for line, message in enumerate(["stands there twice", "16 frames, 4 for each of its four clips, and 5 are needed", "cut.mp4",
                                    "empty.mp4", "text.mp4", "no such file", "notes.txt"], 3):
      assert any(f"line {line} " in row and message in row + reason for row, reason in reasons.items()), (line, reasons)

  def test_sound_alone(self, metadata):
    import av
    with av.open(str(metadata / "sound.mp4"), "w") as container:
      stream = container.add_stream("aac", rate=44100)
      frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
      frame.rate = 44100
      for packet in (*stream.encode(frame), *stream.encode()):
        container.mux(packet)
    write_table(metadata, [("sound.mp4", "x")])
    _, dropped = open_metadata(str(metadata), FORM, drawing())
    assert "no video in" in dropped[0].reason

  def test_missing_column(self, metadata):
    write_table(metadata, [("one.mp4", "x")], header=("file", "text"))
    with pytest.raises(ValueError, match="has no column file_name, only file, text"):
      open_metadata(str(metadata), FORM, drawing())
    with pytest.raises(FileNotFoundError, match="no such table"):
      open_metadata(str(metadata / "nowhere"), FORM, drawing())


@pytest.fixture
def pairs(tmp_path):
  """Two tasks: videos to videos, images to images."""
  for number, name in enumerate(("a", "b b", "c")):
    folder = tmp_path / "depth map" / name
    folder.mkdir(parents=True)
    video(folder / "source.mp4", 6, shade=40 * number)
    video(folder / "target.mp4", 7, shade=40 * number + 4)
    folder = tmp_path / "edges" / name
    folder.mkdir(parents=True)
    for part in ("source.png", "target.jpg"):
      Image.new("RGB", (40, 30), (40 * number,) * 3).save(folder / part)
  return tmp_path


class TestPairs:
  def test_pairs_of_different_names_are_joined(self, pairs):
    sentences, dropped = open_pairs(str(pairs), FORM, drawing(num_clips={4: 1.0, 6: 1.0, 8: 1.0}))
    assert not dropped and sentences.task_names == ("depth map", "edges")
    counts, contexts = set(), set()
    for index in range(len(sentences)):
      sentence = sentences[index]
      counts.add(len(sentence.clips))
      contexts.add((sentence.task, sentence.context))
      shades = [greys(clip)[0] // 40 for clip in sentence.clips]
      assert shades[::2] == shades[1::2] and shades[-2] not in shades[:-2:2]
      assert sentence.prompt.count(sentence.task) == 2
    assert counts == {4, 6, 8}
    assert contexts == {("depth map", "I"), ("depth map", "II"), ("depth map", "III"), ("depth map", "IV"), ("edges", "II")}

  def test_buckets(self, pairs):
    """Upright pairs go to an upright size and are joined among themselves."""
    for number, name in enumerate(("u", "v")):
      folder = pairs / "edges" / name
      folder.mkdir()
      for part in ("source.png", "target.png"):
        Image.new("RGB", (30, 50), (40 * number,) * 3).save(folder / part)
    form = ClipFormat(size=(16, 24), num_frames=5, buckets=((32, 16),))
    sentences, dropped = open_pairs(str(pairs), form, drawing(contexts={"II": 1.0}))
    assert not dropped
    sizes = set()
    for index in range(len(sentences)):
      shapes = {read_frames(clip).shape[1:3] for clip in sentences[index].clips}
      assert len(shapes) == 1
      sizes |= shapes
    assert sizes == {(16, 24), (32, 16)}

  def test_reversed(self, pairs):
    sentences, _ = open_pairs(str(pairs), FORM, drawing(reverse_probability=1.0, contexts={"I": 1.0, "II": 0.1}))
    assert [grey % 40 for clip in sentences[0].clips for grey in greys(clip)[:1]] == [4, 0, 4, 0]

  def test_wrong_pairs_are_named(self, pairs):
    (pairs / "edges" / "c" / "target.jpg").unlink()
    shutil.copy(pairs / "depth map" / "a" / "source.mp4", pairs / "depth map" / "a" / "source.mov")
    (pairs / "depth map" / "b b" / "target.mp4").unlink()
    video(pairs / "depth map" / "b b" / "target.mp4", 3)
    Image.new("RGB", (30, 30)).save(pairs / "edges" / "b b" / "target.jpg")
    extra = pairs / "edges" / "d"
    shutil.copytree(pairs / "edges" / "a", extra)
    bomb = pairs / "edges" / "e"
    shutil.copytree(pairs / "edges" / "a", bomb)
    Image.new("L", (20000, 20000)).save(bomb / "source.png")
    sentences, dropped = open_pairs(str(pairs), FORM, drawing())
    reasons = " | ".join(map(str, dropped))
    assert "needs one target.*, an image or a video, and has 0" in reasons
    assert "needs one source.*, an image or a video, and has 2" in reasons
    assert "edges/b b: the source is 30x40 and the target 30x30: cut to one size they would not lie upon each other" in reasons
    assert "exceeds limit" in reasons and "decompression bomb" in reasons.lower()
    assert "the source has 6 frames and the target 3; 5 of each are needed" in reasons
    assert "depth map: a task needs pairs of at least two names" in reasons
    assert sentences.task_names == ("edges",)

  def test_no_pairs(self, tmp_path):
    with pytest.raises(ValueError, match="no pairs in"):
      open_pairs(str(tmp_path), FORM, drawing())


class TestManifest:
  def write(self, folder, *rows):
    (folder / "m.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return open_manifest(str(folder / "m.jsonl"), FORM, drawing())

  def test_any_sentence(self, tmp_path):
    """Six clips, two targets, starts and lengths of one's own."""
    video(tmp_path / "v.mp4", 12)
    Image.new("RGB", (40, 30), (200, 200, 200)).save(tmp_path / "i.png")
    clips = [{"path": "v.mp4", "start": 3}, {"path": "v.mp4", "num_frames": 1}, {"path": "i.png"}, {"path": "i.png"},
             {"path": "v.mp4", "role": "target", "num_frames": 5}, {"path": "i.png", "role": "target"}]
    sentences, dropped = self.write(tmp_path, {"clips": clips, "prompt": "p", "task": "t"}, "")
    assert not dropped
    sentence = sentences[3]
    assert lengths(sentence) == [5, 1, 1, 1, 5, 1] and greys(sentence.clips[0]) == [24, 32, 40, 48, 56]
    assert sentence.roles == (Role.CONTEXT,) * 4 + (Role.TARGET,) * 2 and (sentence.prompt, sentence.task) == ("p", "t")

  def test_wrong_lines_are_named(self, tmp_path):
    video(tmp_path / "v.mp4", 12)
    target = {"path": "v.mp4", "role": "target"}
    _, dropped = self.write(tmp_path, "{broken", {"clip": []}, {"clips": [{"path": "gone.mp4"}]}, {"clips": [{"role": "target"}]},
                            {"clips": [{**target, "num_frames": 4}]}, {"clips": [{**target, "role": "boss"}]},
                            {"clips": [{**target, "start": 10, "num_frames": 5}]}, {"clips": [target, {"path": "v.mp4"}]},
                            {"clips": [{"path": "v.mp4"}]})
    expected = ["line 1", "unknown key 'clip'", "no such clip", "no 'path'", "1 or 4n + 1 frames, got num_frames 4",
                "context or target, got 'boss'", "gives 2 frames, 5 are asked for", "targets stand last", "needs a target"]
    assert len(dropped) == len(expected)
    for row, message in zip(dropped, expected):
      assert message in str(row)


class TestTFDS:
  def build(self, folder):
    """A data set of eight photographs with labels, written by TFDS itself."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    paths = []
    for index in range(8):
      path = folder / f"{index}.png"
      Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
      paths.append(path)

    class Scenes(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "labels": tfds.features.Tensor(shape=(20, 30), dtype=np.uint8),
            "depth": tfds.features.Tensor(shape=(20, 30, 1), dtype=np.float32)}))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for index, path in enumerate(paths):
          yield index, {"image": str(path), "labels": np.full((20, 30), index, np.uint8),
                        "depth": np.linspace(1, 2, 600, dtype=np.float32).reshape(20, 30, 1)}

    Scenes(data_dir=str(folder / "data"), file_format="array_record").download_and_prepare()
    return str(folder / "data")

  def test_labels_and_depth(self, tmp_path):
    data_dir = self.build(tmp_path)
    options = {"name": "scenes", "split": "train", "data_dir": data_dir, "task": "segmentation map", "source": "image",
               "target": "labels", "kind": "segmentation"}
    depth_range = (1.0, 2.0)
    sentences, dropped = open_tfds(options, FORM, drawing(contexts={"II": 1.0}), depth_range=depth_range)
    assert not dropped and len(sentences.pairs) == 8
    sentence = sentences[3]
    assert sentence.task == "segmentation map" and lengths(sentence) == [1] * 4
    colors = [tuple(read_frames(clip)[0, 8, 8]) for clip in sentence.clips[1::2]]
    assert set(colors) <= {tuple(label_colors(np.array(i))) for i in range(8)} and colors[0] != colors[1]
    depth, _ = open_tfds(options | {"target": "depth", "kind": "depth"}, FORM, drawing(contexts={"II": 1.0}),
                         depth_range=depth_range)
    target = read_frames(depth[0].clips[1])
    assert target[0, 0, 0, 0] > 240 and target[0, -1, -1, 0] < 15
    test, more = depth.split(0.5)[0].asked_by(depth)
    assert not more and [test[i].clips[-1].key for i in range(8)] == [pair.target.clip(1).key for pair in depth.pairs]
    with pytest.raises(ValueError, match="has no feature 'mask'; there are"):
      open_tfds(options | {"target": "mask"}, FORM, drawing(), depth_range=depth_range)
    with pytest.raises(ValueError, match="TFDS has no nothing with split train here"):
      open_tfds(options | {"name": "nothing"}, FORM, drawing(), depth_range=depth_range)


def test_features_become_frames():
  def frames(value, kind):
    return to_frames(value, kind, (0.5, 10.0))
  assert frames(np.zeros((4, 5), np.uint8), "image").shape == (1, 4, 5, 3)
  assert frames(np.zeros((7, 4, 5, 3), np.uint8), "image").shape == (7, 4, 5, 3)
  assert frames(np.eye(4, dtype=bool), "saliency")[0, :, 0, 0].tolist() == [255, 0, 0, 0]
  assert frames(np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]]), "normals").tolist() == [[[[128, 128, 255], [0, 0, 0]]]]
  assert label_colors(np.array([0, 1, 2, 3, 8, 15])).tolist() == [
      [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [192, 128, 128]]
  with pytest.raises(ValueError, match="images are uint8"):
    frames(np.zeros((4, 5, 3)), "image")
  with pytest.raises(ValueError, match="got 'labels'"):
    frames(np.zeros((4, 5, 3)), "labels")


def test_depth_there_and_back():
  """To a two-hundredth of the range; unknown depth stays unknown, and depth beyond the range is at its end."""
  depth = np.array([0.5, 0.7, 3.0, 9.9, 10.0, 0.0, np.nan, np.inf, -1.0, 20.0])[:, None]
  picture = depth_picture(depth, (0.5, 10.0))
  assert known(picture).tolist() == [True] * 5 + [False] * 4 + [True]
  np.testing.assert_allclose(depth_of(picture, (0.5, 10.0))[:5], depth[:5, 0], atol=9.5 / 200)
  assert depth_of(picture, (0.5, 10.0))[9] == pytest.approx(10, abs=0.05)


def test_a_palette(tmp_path):
  path = tmp_path / "palette.txt"
  path.write_text("0 0 0\n120,120,120\n\n180 120 120\n")
  assert read_palette(str(path)).tolist() == [[0, 0, 0], [120, 120, 120], [180, 120, 120]]
  assert len(read_palette("")) == 256
  for text in ("a b c", "1 2\n", "0 0 256", "1 2 3\n4 5"):
    path.write_text(text)
    with pytest.raises(ValueError, match="is no palette"):
      read_palette(str(path))


def test_label_maps_keep_their_colors_when_they_are_resized():
  labels = label_colors(np.random.default_rng(0).integers(0, 9, (1, 4, 6)).repeat(6, 1).repeat(6, 2))
  mixed, kept = (fit_clip(labels, (32, 48), resample=resample) for resample in ("bicubic", "nearest"))
  colors = {tuple(color) for color in labels.reshape(-1, 3)}
  assert {tuple(color) for color in kept.reshape(-1, 3)} <= colors < {tuple(color) for color in mixed.reshape(-1, 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  pytest.importorskip("torch", reason="the release has PyTorch files; needs the extra `convert`")
  from tests.helpers import GOLDENS
  from tools.convert_weights.commands import convert_any
  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(GOLDENS / "tiny_wan"), str(folder))
  return folder


def run(module, *arguments, config="configs/video_tasks.py:wan_1_3b"):
  small = ["--config.model.dtype=float32", "--config.model.param_dtype=float32", "--config.data.height=16",
           "--config.data.width=32", "--config.data.num_frames=5", "--config.rows.num_tokens=48",
           "--config.lora.rank=2", "--config.log_every=1"]
  return run_command(module, f"--config={config}", *small, *arguments)


@pytest.mark.long
def test_the_road(checkpoint, metadata, tmp_path):
  """Prepare, train a LoRA, go on, paint with it, carry it to another program: as a user does it."""
  common = [f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}",
            "--config.data.variants=4"]
  done = run("univid_jax.prepare", *common)
  assert done.returncode == 0, done.stderr
  assert "16 clips are ready (16 encoded now)" in done.stdout
  done = run("univid_jax.prepare", *common)
  assert "16 clips are ready (0 encoded now)" in done.stdout
  done = run("univid_jax.train", *common, "--config.num_steps=2")
  assert done.returncode == 0, done.stderr
  done = run("univid_jax.train", *common, "--config.num_steps=4")
  assert done.returncode == 0 and "resuming" in done.stdout and "step 2 of 4" in done.stdout, done.stderr
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 2, 3, 4]
  video(tmp_path / "clip.mp4", 9)
  from univid_jax.pipeline import load_pipeline
  from univid_jax.weights.lora import read_lora
  clips = [np.random.default_rng(i).integers(0, 255, (5, 16, 32, 3), np.uint8) for i in range(3)]
  whole, beside = (load_pipeline(*paths, dtype="float32") for paths in (
      (str(tmp_path / "run"),), (str(checkpoint), str(tmp_path / "run" / "lora.safetensors"))))
  painted = [pipe.sample(clips, num_inference_steps=2, prompt="x").latents for pipe in (whole, beside)]
  np.testing.assert_allclose(*painted, atol=1e-5)
  done = run_command("tools.convert_weights", tmp_path / "run", tmp_path / "out.safetensors", "--to=diffusers")
  assert done.returncode == 0, done.stderr
  lora = read_lora(tmp_path / "out.safetensors")
  assert lora.metadata["step"] == "4" and len(lora.layers) == 30


def test_rows_that_cannot_be_used_end_the_run_unless_allowed(checkpoint, metadata, tmp_path):
  write_table(metadata, [("one é.mp4", "x"), ("gone.mp4", "x")])
  common = [f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}"]
  done = run("univid_jax.prepare", *common)
  assert done.returncode == 1 and "1 of the listed rows cannot be used, first metadata.csv line 3 (gone.mp4)" in done.stderr
  done = run("univid_jax.prepare", *common, "--allow_dropped")
  assert done.returncode == 0 and "dropped: metadata.csv line 3 (gone.mp4)" in done.stdout and "1 rows dropped" in done.stdout
  done = run("univid_jax.prepare", *common, "--allow_dropped", "--preview=2")
  assert done.returncode == 0 and Image.open(tmp_path / "run" / "preview.png").size[0] > 300


def test_no_data(checkpoint, tmp_path):
  done = run("univid_jax.train", f"--config.init_from={checkpoint}", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 1 and "there is no data: give config.data.folder" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_the_same_with_any_number_of_threads(pairs):
  """A mixture of sources, shuffled and packed, is the same whatever reads it; two processes share it."""
  from univid_jax.data.loader import FeatureMaker, make_loader
  from univid_jax.data.packing import RowShape
  sentences, _ = open_pairs(str(pairs), FORM, drawing())
  maker = FeatureMaker(encode=lambda clip: read_frames(clip)[::4, ::8, ::6, :].astype(np.float32), patch_size=(1, 2, 2),
                       embed_prompt=lambda prompt: np.zeros((0, 3), np.float32), text_len=4, task_names=("depth map", "edges"))

  def batches(**options):
    loader = make_loader([sentences, sentences], maker, row_shape=RowShape(num_tokens=24, num_text_tokens=4, num_slots=4),
                         rows_per_batch=2, seed=1, weights=[2.0, 1.0], **options)
    out = list(itertools.islice(loader, 4))
    loader.close()
    return [row.tokens for row in out]

  assert all(np.array_equal(a, b) for a, b in zip(batches(), batches(num_threads=4)))


@pytest.mark.slow
def test_two_processes_prepare_one_cache(checkpoint, metadata, tmp_path):
  """At the same time: both end well, and the cache is whole."""
  arguments = ["univid_jax.prepare", "--config=configs/video_tasks.py:wan_1_3b", "--config.data.height=16",
               "--config.data.width=32", "--config.data.num_frames=5", "--config.rows.num_tokens=48",
               f"--config.init_from={checkpoint}", f"--config.data.metadata={metadata}", f"--workdir={tmp_path / 'run'}"]
  both = [start_command(*arguments) for _ in range(2)]
  for process in both:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "16 clips are ready" in out, error
  files = list((tmp_path / "run" / "cache" / "latents").rglob("*.*"))
  assert len(files) == 16 and all(path.suffix == ".safetensors" for path in files)
