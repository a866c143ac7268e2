"""The run configuration: valid values load from flags, JSON and earlier versions; invalid ones are named."""

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_origin, get_type_hints
from unittest import mock

import numpy as np
import pytest

from tests.helpers import GOLDENS
from univid_jax.checkpoints.run import RunRecord, read_run, write_run
from univid_jax.checkpoints.sentence_lengths import check_rows
from univid_jax.config import data as config_data
from univid_jax.config import grids as config_grids
from univid_jax.config.boundary import differences, from_config_dict, from_json, override, to_config_dict, to_json
from univid_jax.config.presets import PRESETS, get_config, tiny, wan_1_3b
from univid_jax.config.schema import DataConfig, ModelConfig, RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import RematPolicy
from univid_jax.training.setup import check_config, check_precision, ignored_options


@pytest.mark.parametrize("preset", PRESETS)
def test_conversions_are_lossless(preset):
  config = PRESETS[preset]()
  assert from_config_dict(get_config(preset)) == config
  assert from_config_dict(to_config_dict(config)) == config
  assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
  "stored, files",
  [
    ("", ()),
    ("high=a:0.5,low=b", ("high=a:0.5", "low=b")),
    (["high=a", "low=b"], ("high=a", "low=b")),
    (Path("a"), ("a",)),
    ([], ()),
  ],
)
def test_a_distillation_may_be_stored_as_text(stored, files):
  """As by earlier versions."""
  config = override(tiny(), {"validation.accelerate": stored})
  assert config.validation.accelerate == files and from_json(to_json(config)) == config
  with pytest.raises(UserError, match=r"config\.validation\.accelerate must be text, got 5"):
    override(tiny(), {"validation.accelerate": ["a", 5]})


def test_unknown_preset():
  with pytest.raises(UserError, match="unknown preset 'huge'; there are tiny, grids, small, small_lora, wan_1_3b"):
    get_config("huge")


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("model.dim", 0, "config.model.dim must be at least 1, got 0"),
    ("model.dimm", 1, "unknown key config.model.dimm"),
    ("modle.dim", 1, "unknown key config.modle.dim"),
    ("model.remat", "half", "config.model.remat must be one of none, dots, attention, full, offload, got 'half'"),
    ("model.attention", "causal", "config.model.attention must be one of full, context_causal, got 'causal'"),
    ("model.attention_backend", "magic", "config.model.attention_backend must be one of auto, xla, cudnn, splash"),
    ("model.dtype", "float33", "config.model.dtype must be one of float32, bfloat16, float16, got 'float33'"),
    ("num_steps", 0, "config.num_steps must be at least 1, got 0"),
    ("num_steps", 2.5, "config.num_steps must be an integer, got 2.5"),
    ("num_steps", True, "config.num_steps must be an integer, got True"),
    ("ema_decay", 1.0, r"config.ema_decay must be from 0 to 1 \(exclusive\), got 1.0"),
    ("rows.num_tokens", "many", "config.rows.num_tokens must be an integer, got 'many'"),
    ("rows.packing", "tight", "config.rows.packing must be one of first_fit, best_fit, balanced, got 'tight'"),
    ("lora.dropout", -0.1, r"config.lora.dropout must be from 0 to 1 \(exclusive\), got -0.1"),
    ("optimizer.schedule", "spiral", "config.optimizer.schedule must be one of constant, cosine, linear"),
    ("flow.shift", 0.0, "config.flow.shift must be positive, got 0.0"),
    ("flow.shift", 2000.0, "config.flow.shift must be at most 1000, got 2000.0"),
    ("data.fps", 20_000, "config.data.fps must be at most 10000, got 20000.0"),
    ("flow.objective", "best", "config.flow.objective must be one of univid, diffsynth"),
    ("validation.sigmas", (), "config.validation.sigmas must be one or more noise levels above 0 and at most 1"),
    ("validation.sentences", 0, "config.validation.sentences must be at least 1, got 0"),
    ("mesh.fsdp", 0, "config.mesh.fsdp must be a positive number of devices, or -1"),
    ("mesh.fsdp", -1, "config.mesh may have only one axis of -1"),
    ("data.num_frames", 6, r"config.data.num_frames must be 4n \+ 1 \(5 or 9\), got 6"),
    ("data.held_out", 1.0, "config.data.held_out must be from 0 to 1"),
    ("data.buckets", ["480"], "config.data.buckets must be sizes HEIGHTxWIDTH, for example 480x832"),
    ("data.fit", "stretch", "config.data.fit must be one of crop, pad, got 'stretch'"),
    ("data.prompt", "poetic", "config.data.prompt must be one of null, rough, detailed, got 'poetic'"),
    ("data.kinds", {"x": "magic"}, "config.data.kinds.x must be one of image, depth"),
    ("data.kinds", {"x": "image"}, "config.data.kinds.x must be one of depth, normals"),
    ("data.max_video_clips", 5, "config.data.max_video_clips must be 0, 4, 6, 8, ..., got 5"),
    ("data.num_clips", {"clips_5": 1.0}, "config.data.num_clips must have keys clips_4, clips_6"),
    ("data.contexts", {"I": -1.0}, "config.data.contexts.I must be at least 0, and finite, got -1.0"),
    ("data.tasks", {"invert": float("inf")}, "config.data.tasks.invert must be at least 0, and finite, got inf"),
    ("seed", 2**63 - 1, r"config.seed must be from 0 to 2\*\*63 - 2"),
    ("eval.seed", 10**13, r"config.eval.seed must be from 0 to 10\*\*12"),
    ("data.weights.pairs", -1.0, "config.data.weights.pairs must be at least 0, and finite, got -1.0"),
    ("data.weights.pairs", float("inf"), "config.data.weights.pairs must be at least 0, and finite, got inf"),
    ("data.depth_range", (5.0, 1.0), "config.data.depth_range must be two increasing positive distances"),
    ("data.test_pairs", "dir", "config.data.test_pairs is a test set, and there is no training data"),
    ("data.tfds.test_split", "test", "config.data.tfds.test_split is a test set, and there is no training data"),
    ("lora.dropout", 0.5, r"config.lora.dropout must be 0 without adapters \(config.lora.rank is 0\), got 0.5"),
    ("lora", {"rank": 2, "targets": ()}, r"config.lora.targets must be at least one pattern, got \(\)"),
    ("rows.num_target_tokens", 193, "config.rows.num_target_tokens must be at most num_tokens = 192, got 193"),
    ("lora.alpha", -16.0, "config.lora.alpha must be positive and finite, got -16.0"),
    ("lora.alpha", 0, "config.lora.alpha must be positive and finite, got 0.0"),
    ("lora", {"rank": 8, "alpha": 1e6}, r"config.lora.alpha must be at most 10000 times rank \(rank is 8\), got 10000"),
    ("lora", {"rank": 16, "alpha": 1e5, "rslora": True}, r"must be at most 10000 times sqrt\(rank\) \(rank is 16\)"),
    ("model.rope_scale", -1.0, "config.model.rope_scale must be positive, got -1.0"),
    ("model.look_back", (1, -2), "config.model.look_back must be distances in latent frames, each from 0 to 1023"),
    ("rows.num_tokens", 10**20, "config.rows.num_tokens must be at most 2,147,483,647, got 100000000000000000000"),
    ("rows.per_batch", 10**20, "config.rows.per_batch must be at most 2,147,483,647, got 100000000000000000000"),
    ("data.buckets", ["0x32"], "config.data.buckets must be sizes HEIGHTxWIDTH"),
    ("eval.more_steps", (4, 1001), "config.eval.more_steps must be numbers of steps, each at least 1 and at most 1000"),
    ("eval.depth_alignment", "eye", "config.eval.depth_alignment must be one of least_squares, median, none"),
  ],
)
def test_invalid_values_are_named(key, value, message):
  with pytest.raises(UserError, match=message):
    override(tiny(), {key: value})


def numbers(section, prefix=""):
  """Yields (key, senseless value, the number in it) for every number, tuple and mapping of numbers of a section."""
  kinds = get_type_hints(type(section))
  for field in dataclasses.fields(section):
    value, kind, key = getattr(section, field.name), kinds[field.name], prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from numbers(value, f"{key}.")
      continue
    origin, arguments = get_origin(kind), [part for part in get_args(kind) if part is not Ellipsis]
    for number in (float("nan"), float("inf"), float("-inf")) if float in (kind, *arguments) else (10**20, -(10**20)):
      if kind in (int, float):
        yield key, number, number
      elif origin is tuple and arguments[0] in (int, float):
        yield key, (*value[:-1], number), number
      elif origin is Mapping and arguments[1] is float:
        yield f"{key}.{next(iter(value))}", number, number


@pytest.mark.parametrize(
  "key, value", [pytest.param(key, value, id=f"{key}={number:g}") for key, value, number in numbers(RunConfig())]
)
def test_no_number_is_unbounded(key, value):
  with pytest.raises(UserError, match=re.escape(key.rpartition(".")[2])):
    override(tiny(), {key: value})


def test_a_row_too_short_for_a_sentence():
  with pytest.raises(
    UserError, match=r"a sentence of 4 clips of context I has 128 tokens, config\.rows\.num_tokens is only 64"
  ):
    check_rows(override(tiny(), {"rows.num_tokens": 64}))


def test_rows_are_as_long_as_the_contexts_that_are_drawn_need():
  only = {f"data.contexts.{name}": 0.0 for name in ("I", "II", "III", "IV")}
  images = override(tiny(), {"rows.num_tokens": 64, **only, "data.contexts.II": 1.0})
  check_rows(images)
  with pytest.raises(UserError, match="context III has 96 tokens"):
    check_rows(override(images, {"data.contexts.III": 1.0}))
  with pytest.raises(UserError, match="context IV has 96 tokens"):  # camera movement makes videos of images
    check_rows(override(images, {"data.tasks.camera_movement": 1.0, "data.animating_contexts.I": 0.0}))
  for own in ("data.metadata", "data.pairs", "data.tfds.name"):  # without a folder there are no computed tasks then
    check_rows(override(images, {"data.tasks.camera_movement": 1.0, own: "x"}))


def test_precision_of_training(caplog):
  check_precision(override(wan_1_3b(), {"model.dtype": "bfloat16"}))
  assert not caplog.text
  check_precision(override(wan_1_3b(), {"lora.rank": 0}))
  assert "config.model.param_dtype = bfloat16, and all weights are trained" in caplog.text
  with pytest.raises(UserError, match=r"config\.model\.dtype = float16 loses small gradients"):
    check_precision(override(tiny(), {"model.dtype": "float16"}))


def test_rows_are_as_long_as_the_numbers_of_clips_that_are_drawn_need():
  longer = override(tiny(), {"rows.num_tokens": 256, "data.num_clips.clips_8": 1.0})
  check_rows(longer)
  short = {"rows.num_tokens": 128}
  with pytest.raises(UserError, match="a sentence of 8 clips of context I has 256 tokens"):
    check_rows(override(longer, short))
  check_rows(override(longer, short | {"data.max_video_clips": 4}))  # eight images are as long as four videos
  with pytest.raises(UserError, match="a sentence of 8 clips of context II has 128 tokens"):
    check_rows(override(longer, {"rows.num_tokens": 127, "data.max_video_clips": 4}))
  check_rows(override(longer, short | {"data.metadata": "folder"}))  # whose sentences have four clips
  for more in ("data.folder", "data.pairs", "data.tfds.name"):
    with pytest.raises(UserError, match="a sentence of 8 clips"):
      check_rows(override(longer, short | {"data.metadata": "folder", more: "x"}))
  with pytest.raises(UserError, match="a sentence of 8 clips"):
    check_rows(override(longer, short | {"data.metadata": "folder", "data.grids.families.life": 1.0}))
  check_rows(override(longer, short | {"data.metadata": "folder", "data.grids.families.recolor": 1.0}))  # images


@pytest.mark.parametrize(
  "preset, values, ignored",
  [
    ("small_lora", {}, []),
    ("small_lora", {"model.rope_scale": 2.0}, ["config.model.rope_scale = 2.0 (it is 1.57)"]),
    ("small_lora", {"model.look_back": (1, 2)}, ["config.model.look_back = (1, 2) (for new weights only)"]),
    ("tiny", {"init_from": "small"}, []),
    ("tiny", {"vae_tiling.size": 16}, ["config.vae_tiling.size = 16 (for autoencoders only)"]),
    ("tiny", {"model.dim": 64, "model.look_back": (1, 2)}, []),
    ("wan_1_3b", {}, []),
    ("wan_1_3b", {"model.num_layers": 2}, ["config.model.num_layers = 2 (it is 30)"]),
    (
      "small_lora",
      {"codec.spatial_stride": 8, "codec.latent_channels": 4, "vae_tiling.size": 16},
      [
        "config.vae_tiling.size = 16 (for autoencoders only)",
        "config.codec.latent_channels = 4 (it is 16)",
        "config.codec.spatial_stride = 8 (it is 4)",
      ],
    ),
  ],
)
def test_values_without_effect(preset, values, ignored, caplog):
  config = override(PRESETS[preset](), values)
  assert ignored_options(config) == ignored
  if preset == "small_lora":
    check_config(config)
    assert all(text in caplog.text for text in ("ignored, because small sets them: ", *ignored)) == bool(ignored)


def test_numbers_convert_where_exact():
  config = override(tiny(), {"optimizer.learning_rate": 1, "num_steps": 5.0, "model.remat": "dots"})
  assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
  assert config.num_steps == 5 and isinstance(config.num_steps, int)
  assert config.model.remat is RematPolicy.DOTS


def test_presets_do_not_draw_what_is_added_later(monkeypatch):
  """Their runs go on when a task or a family of grids is added, as CONTRIBUTING.md describes it."""
  before = {name: make() for name, make in PRESETS.items()}
  monkeypatch.setattr(config_data, "_OTHER_TASKS", (*config_data._OTHER_TASKS, "new_task"))
  monkeypatch.setattr(config_grids, "GRID_FAMILY_NAMES", (*config_grids.GRID_FAMILY_NAMES, "new_family"))
  for name, make in PRESETS.items():
    config = make()
    assert config.data.tasks["new_task"] == config.data.grids.families["new_family"] == 0  # flags can change them
    assert list(differences(before[name], config)) == []


class TestPython:
  """Configs that are built in Python, without flags or JSON."""

  @pytest.mark.parametrize(
    "make, message",
    [
      (lambda: RunConfig(num_steps="5"), "config.num_steps must be an integer, got '5'"),
      (lambda: RunConfig(num_steps=5.5), "config.num_steps must be an integer, got 5.5"),
      (lambda: RunConfig(seed=None), "config.seed must be an integer, got None"),
      (lambda: RunConfig(seed=np.True_), "config.seed must be an integer, got True"),
      (lambda: RunConfig(name=5), "config.name must be text, got 5"),
      (lambda: RunConfig(ema_decay="0.9"), "config.ema_decay must be a number, got '0.9'"),
      (lambda: RunConfig(data="photos"), "config.data must be a mapping, got 'photos'"),
      (lambda: RunConfig(data={"heigth": 64}), "unknown key config.data.heigth; did you mean config.data.height? "),
      (lambda: RunConfig(data={"height": "64"}), "config.data.height must be an integer, got '64'"),
      (lambda: DataConfig(bundled="no"), "config.data.bundled must be True or False, got 'no'"),
      (lambda: DataConfig(tasks={"invert": "1"}), "config.data.tasks.invert must be a number, got '1'"),
      (lambda: DataConfig(tasks=["invert"]), "config.data.tasks must be a mapping, got ['invert']"),
      (lambda: DataConfig(buckets="64x96"), "config.data.buckets must be a list, got '64x96'"),
      (lambda: DataConfig(tfds={"name": 1}), "config.data.tfds.name must be text, got 1"),
      (lambda: ModelConfig(remat="half"), "config.model.remat must be one of none, dots, attention, full, offload"),
      (lambda: dataclasses.replace(tiny(), log_every=[1]), "config.log_every must be an integer, got [1]"),
    ],
  )
  def test_types_are_checked(self, make, message):
    with pytest.raises(UserError, match=re.escape(message)):
      make()

  def test_what_stands_for_a_value_becomes_it(self):
    values = {
      "num_steps": np.int64(7),
      "ema_decay": np.float32(0.5),
      "init_from": Path("bases") / "mine",
      "base": {"offload": np.False_},
      "model": {"remat": "dots", "look_back": [1, np.int32(2)]},
      "data": DataConfig(folder=Path("photos"), tasks={"invert": np.float64(1), "flip": 0}, buckets=["64x96"]),
    }
    config = RunConfig(**values)
    assert config == override(tiny(), values)
    assert json.loads(json.dumps(to_json(config))) == to_json(config)
    assert (type(config.num_steps), type(config.ema_decay)) == (int, float)
    assert (config.init_from, config.data.folder) == (str(Path("bases") / "mine"), "photos")
    assert config.model.remat is RematPolicy.DOTS
    assert (config.model.look_back, config.data.buckets) == ((1, 2), ("64x96",))

  def test_a_mapping_of_the_caller_is_not_part_of_the_config(self):
    tasks = {"invert": 1.0}
    config = DataConfig(tasks=tasks)
    tasks["invert"] = -1.0
    assert config.tasks == {"invert": 1.0}

  @pytest.mark.parametrize("kind", [dict, types.MappingProxyType])
  def test_overrides_do_not_change_the_mappings_of_the_caller(self, kind):
    tasks = {"invert": 1.0}
    data = {"height": 64, "tasks": tasks}
    config = override(tiny(), {"data": kind(data), "data.width": 96, "data.tasks.flip": 2.0})
    assert (config.data.height, config.data.width, config.data.tasks) == (64, 96, {"invert": 1.0, "flip": 2.0})
    assert (data, tasks) == ({"height": 64, "tasks": {"invert": 1.0}}, {"invert": 1.0})


def test_differences_name_keys():
  changed = override(tiny(), {"seed": 3, "model.dim": 64})
  assert list(differences(tiny(), changed)) == [("model.dim", 128, 64), ("seed", 0, 3)]


def test_a_task_that_an_earlier_version_lacked_differs_unless_its_weight_is_0():
  config = tiny()
  earlier = {name: weight for name, weight in config.data.tasks.items() if name not in ("scribble", "invert")}
  before = dataclasses.replace(config, data=dataclasses.replace(config.data, tasks=earlier))
  assert list(differences(before, config)) == [("data.tasks.invert", None, 1.0)]


def test_sections_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny().model.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


class TestStoredConfigs:
  @pytest.mark.parametrize("name", ["0.1.0_tiny", "0.1.0_lora"])
  def test_earlier_versions_load(self, tmp_path, name):
    (tmp_path / "config.json").write_text((GOLDENS / "configs" / f"{name}.json").read_text())
    record = read_run(tmp_path)
    assert record is not None and record.version == "0.1.0"
    assert record.config.lora.enabled == any(record.base)

  @pytest.mark.parametrize("base", [("",), ("abc",), ("abc", "def")])
  def test_round_trip(self, tmp_path, base):
    record = RunRecord(override(tiny(), {"seed": 7}), base, "1.2.3", {"invert": "x"}, {"vae": "def"})
    write_run(tmp_path, record)
    assert read_run(tmp_path) == record
    assert json.loads((tmp_path / "config.json").read_bytes())["base"] == ",".join(base)

  def test_missing_keys_take_defaults(self):
    values = to_json(tiny())
    del values["rows"]["packing"], values["validation"]
    assert from_json(values) == RunConfig()

  @pytest.mark.parametrize(
    "content, message",
    [
      ("{", "is not valid JSON"),
      ("[]", "must contain a JSON object"),
      ('{"model": {}, "data": {}, "rows": {}, "new": 1}', "unknown key config.new"),
    ],
  )
  def test_unreadable_configs_are_one_line(self, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
      read_run(tmp_path)

  def test_a_kill_while_it_is_written_loses_nothing(self, tmp_path, monkeypatch):
    """A new file replaces the old one."""
    record = RunRecord(tiny(), base=("",), version="1")
    write_run(tmp_path, record)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
      patch.setattr(Path, "replace", mock.Mock(side_effect=InterruptedError))
      write_run(tmp_path, dataclasses.replace(record, version="2"))
    assert read_run(tmp_path) == record

  def test_no_config(self, tmp_path):
    assert read_run(tmp_path) is None
    assert read_run(GOLDENS / "tiny_wan") is None  # the config.json of a release
