"""What the Python interface says to values that it cannot take, in one line, and which forms it takes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import univid_jax
from tests.clip_files import write_image
from tests.helpers import give_prompts, random_pipeline
from tests.typecheck import unchecked
from univid_jax.checkpoints.origin import Origin
from univid_jax.config import presets
from univid_jax.config.boundary import override
from univid_jax.core.checks import require_number
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_SEED, ModelType, Objective
from univid_jax.core.text import describe_value
from univid_jax.data.media.reader import LoadedClip
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import Euler
from univid_jax.inference.encoding import Sample
from univid_jax.inference.long_video import VideoSample
from univid_jax.parallel.mesh import make_mesh

A, A2, B = (np.full((1, 64, 64, 3), grey, np.uint8) for grey in (10, 120, 240))
CLIPS = [A, A2, B]


def make_pipeline():
  """Makes one for clips of the size of `small`, with one narrow layer."""
  narrow = {"dim": 32, "ffn_dim": 32, "num_heads": 1, "num_layers": 1, "look_back": ()}
  config = override(presets.small(), {f"model.{key}": value for key, value in narrow.items()})
  return random_pipeline(config, make_mesh({}, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def pipe():
  return make_pipeline()


def refuse(call, *messages):
  """Calls what has to raise a UserError of one line with all these texts."""
  with unchecked(), pytest.raises(UserError) as caught:
    call()
  assert all(message in str(caught.value) for message in messages) and "\n" not in str(caught.value), caught.value


def sample(pipe, clips=CLIPS, **options):
  return pipe.sample(clips, **{"num_inference_steps": 1} | options)


@pytest.mark.parametrize("form", [tuple, iter, np.stack], ids=["tuple", "generator", "stacked"])
def test_clips_may_be_any_iterable(pipe, form):
  with unchecked():
    found = sample(pipe, form(CLIPS), preview=lambda taken, draw: draw())
  assert np.array_equal(found.latents, sample(pipe).latents)


@pytest.mark.parametrize(
  "clips", [None, 5, "A.png", {"A": A}, A, [A, None, B], [A, "A.png", B], [A[0]] * 3, [A / 255] * 3, [A[..., :1]] * 3]
)
def test_other_clips_are_refused(pipe, clips):
  for call in (sample, lambda pipe, clips: pipe.sample_batch([clips])):
    refuse(lambda call=call: call(pipe, clips), "clips", "uint8", "(T, H, W, 3), ")


NUMBER, WHOLE = "must be a positive number, got", "must be a whole number"


@pytest.mark.parametrize(
  "option, values, message",
  [
    ("seed", [None, 1.5, "a", True, [1, 2], jax.random.key(0), MAX_SEED + 1, 2**64, -MAX_SEED - 2], WHOLE),
    ("num_frames", ["5", 5.5, 0, True, [5]], f"{WHOLE} of at least 1, got"),
    ("num_inference_steps", ["2", 1.5, 0, True, [2], 1001], f"{WHOLE} from 1 to 1000, got"),
    ("shift", ["5", 0, True, [5], float("nan"), float("inf")], NUMBER),
    ("shift", [1000.1], "must be at most 1000, got 1000.1"),
    ("guidance_scale", ["3", True, {}, [None], (1, "2")], "must be a number, got"),
    ("guidance_scale", [float("nan"), (1.0, float("inf"))], "guidance"),
    ("guidance_range", [5, "ab"], "must be a list of two noise levels, got"),
    ("guidance_range", [(None, 1)], "must be a number, got None"),
    ("sigmas", [5, "abc"], "must be a list of noise levels, got"),
    ("sigmas", [[None], [True]], "must be a number, got"),
    ("solver", [5, True, object(), Euler], "must be one of euler, unipc, distilled, or your own, got"),
    ("step_cache", [5, "magcache", {}, True], "must be a StepCache"),
    ("prompt", [None, 5, b"a", ["a"], np.zeros(16)], "must be text, or an embedding (n, 16), got"),
    ("prompt_embeds", [5, "abc", np.zeros((2, 3)), np.zeros(3)], "must be an embedding (n, 16), got"),
    ("latents", [5, [[1]], np.zeros((1, 1, 1, 1))], "must have the target's shape (1, 16, 16, 16), got"),
    ("latents", ["a", [[1], [1, 2]], np.zeros((1, 16, 16, 16), bool)], "must be an array of numbers, got"),
    ("first_frame", [5, B, "B.png", B[0] / 255, B[0, ..., :1]], "must be an image, uint8 (H, W, 3), got"),
    ("progress", [5, "a"], "must be a function, got"),
    ("preview", [5, True], "must be a function, got"),
  ],
)
def test_other_values_of_options_are_refused(pipe, option, values, message):
  for value in values:
    options = {option: value} if option != "sigmas" else {option: value, "num_inference_steps": None}
    refuse(lambda options=options: sample(pipe, **options), option.split("_")[0], message)


@pytest.mark.parametrize(
  "option, value, same",
  [
    ("seed", np.int64(3), 3),
    ("seed", jnp.int32(3), 3),
    ("num_frames", np.int64(1), 1),
    ("num_inference_steps", np.int32(1), 1),
    ("shift", np.float32(3), 3),
    ("shift", jnp.float32(3), 3.0),
  ],
  ids=str,
)
def test_numbers_of_other_types_are_taken(pipe, option, value, same):
  with unchecked():
    found = sample(pipe, **{option: value})
    assert pipe.plan(sigmas=(level for level in (1.0, 0.5))).sigmas.tolist() == [1.0, 0.5]
  assert np.array_equal(found.latents, sample(pipe, **{option: same}).latents)


@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_of_the_negative_prompt(pipe, negative):
  options = {"negative_prompt_embeds": np.zeros((2, 3))} if negative else {"negative_prompt": 5}
  refuse(lambda: sample(pipe, guidance_scale=2.0, **options), "negative_prompt", "an embedding (n, 16), got")


def test_guidance_without_effect_is_not_computed(pipe, caplog):
  """And is said once."""
  pipe._warned.clear()
  plain, shown = sample(pipe), []
  for _ in range(2):
    guided = sample(pipe, guidance_scale=3.0)
    (batched,) = pipe.sample_batch([CLIPS], num_inference_steps=1, guidance_scale=3.0)
    assert np.array_equal(guided.latents, plain.latents) and np.abs(batched.latents - plain.latents).max() < 1e-4
  assert len(pipe.embed_branches(pipe.plan(1, guidance_scale=3.0), "", "")) == 1
  shown = [record.message for record in caplog.records if "guidance has no effect" in record.message]
  assert len(shown) == 1 and "negative prompt equals the prompt" in shown[0]


def test_guidance_with_effect(caplog):
  pipe = give_prompts(make_pipeline())
  plain, guided = (sample(pipe, guidance_scale=scale, negative_prompt="no").latents for scale in (1.0, 3.0))
  assert not np.array_equal(plain, guided) and not caplog.records


@pytest.mark.parametrize("model_type", [ModelType.T2V, ModelType.TI2V])
def test_a_first_frame_is_new_to_all_but_ti2v(monkeypatch, caplog, model_type):
  pipe = make_pipeline()
  object.__setattr__(pipe, "config", type(pipe.config)(**{**vars(pipe.config), "model_type": model_type}))
  for _ in range(2):
    pipe.make_job([np.repeat(clip, 5, 0) for clip in CLIPS], None, 0, first_frame=B[0])
  assert len(caplog.messages) == (model_type == ModelType.T2V)
  assert all("a given first frame, which only TI2V models know" in message for message in caplog.messages)


FRAMES, LATENTS = np.zeros((1, 64, 64, 3), np.float32), np.zeros((1, 16, 16, 16), np.float32)


@pytest.mark.parametrize(
  "frames, message",
  [
    (255 * np.ones_like(FRAMES), "float32 from 255 to 255"),
    (FRAMES - 1.5, "float32 from -1.5 to -1.5"),
    (FRAMES + np.nan, "float32 from nan to nan"),
    (FRAMES.astype(int), "int64"),
    (FRAMES.astype(bool), "bool"),
    (FRAMES[0], "float32 (64, 64, 3)"),
    (np.concatenate([A, A], -1), "uint8 (1, 64, 64, 6)"),
    ("A.png", "'A.png'"),
  ],
)
def test_only_frames_are_encoded(pipe, frames, message):
  refuse(lambda: pipe.encode(frames), "frames must be a clip (T, H, W, 3), uint8 or float within [-1, 1], got", message)


def test_float_frames_are_encoded_as_decoding_leaves_them(pipe):
  expected = pipe.encode(B)
  for frames in (B / 127.5 - 1, jnp.asarray(B / 127.5 - 1), (B / 127.5 - 1) * 1.001):
    np.testing.assert_allclose(pipe.encode(frames), expected, atol=0.02)
  assert pipe.encode(pipe.decode(expected)).shape == expected.shape


@pytest.mark.parametrize("latents", [LATENTS[0], LATENTS[..., :3], LATENTS[:0], "a", None])
def test_only_latents_are_decoded(pipe, latents):
  refuse(lambda: pipe.decode(latents), "latents")
  refuse(lambda: list(pipe.decode_parts(latents)), "latents")


@pytest.mark.parametrize(
  "name, value, message",
  [
    *(("timestep", value, "from 0 to 1000") for value in (None, np.nan, -1.0, 2000.0, "5", np.zeros((1, 1)))),
    ("timestep", [1.0, 2.0], "one for each of the 1 latent frames, got 2"),
    ("latents", LATENTS[0], "latents must be an array (t, y, x, 16), got float32 (16, 16, 16)"),
    ("latents", LATENTS[:, :15], "latents must divide into patches of 1 x 2 x 2 (t, y, x), got float32 (1, 15"),
    ("latents", LATENTS[..., :3], "latents of this model have 16 channels, got 3"),
    ("prompt_embeds", np.zeros((2, 3)), "prompt_embeds must be an embedding (n, 16), got float64 (2, 3)"),
    ("prompt_embeds", None, "prompt_embeds must be an embedding (n, 16), got None"),
  ],
)
def test_inputs_of_a_velocity(pipe, name, value, message):
  given = {"latents": LATENTS, "timestep": 500.0, "prompt_embeds": np.zeros((0, 16), np.float32)}
  refuse(lambda: pipe.predict_velocity(**given | {name: value}), message)


@pytest.mark.parametrize("call", ["encode", "decode", "predict_velocity"])
def test_what_runs_on_the_host_cannot_be_traced(pipe, call):
  arguments = {"encode": (FRAMES,), "decode": (LATENTS,), "predict_velocity": (LATENTS, 5.0, np.zeros((0, 16)))}[call]
  refuse(lambda: jax.jit(getattr(pipe, call))(*arguments), "is traced", "nnx.merge(expert.graph, expert.load())")


def test_a_sample_cannot_be_traced(pipe):
  refuse(lambda: jax.jit(lambda clip: sample(pipe, [clip] * 3).latents)(B), "a clip is traced")
  refuse(lambda: jax.jit(lambda scale: sample(pipe, guidance_scale=scale).latents)(2.0), "guidance_scale must be a num")


def test_clips_of_jax_and_numbers_of_bfloat16(pipe):
  """As `sample` takes them, so do its relatives."""
  clips = [jnp.asarray(clip) for clip in CLIPS]
  with unchecked():
    (query,) = pipe.sample_queries(clips[:2], clips[2:], num_inference_steps=1)
    video = pipe.sample_video(clips[:2], jnp.concatenate([clips[2]] * 9), num_inference_steps=1)
    scaled = sample(pipe, guidance_scale=jnp.bfloat16(1), shift=np.float32(5))
  assert np.array_equal(scaled.latents, sample(pipe, shift=5.0).latents)
  np.testing.assert_allclose(query.latents, sample(pipe, CLIPS).latents, atol=1e-4)
  assert isinstance(video, VideoSample)


@pytest.mark.parametrize("value", [jnp.bfloat16(0.5), np.float16(0.5), jnp.asarray(0.5), 0.5, np.int8(1)])
def test_numbers_of_any_type(value):
  assert require_number("x", value) in (0.5, 1.0)


@pytest.mark.parametrize("value", ["0.5", None, True, 10**400, jnp.ones(2), np.ndarray])
def test_what_is_no_number(value):
  refuse(lambda: require_number("x", value), "x must be a number, got ")


def test_options_are_shown_as_users_write_them():
  assert describe_value(ModelType.T2V) == "'t2v'" and describe_value(np.zeros((2, 3))) == "float64 (2, 3)"


@pytest.mark.parametrize(
  "options, message",
  [
    ({"seeds": 0}, "seeds must be a list of whole numbers, one per sentence, got 0"),
    ({"seeds": "1"}, "seeds must be a list"),
    ({"seeds": [1.5]}, "seed must be a whole number"),
    ({"prompts": ""}, "prompts must be a list of texts, one per sentence, got ''"),
    ({"prompts": [None]}, "each of prompts must be text, got None"),
    ({"prompts": []}, "there are 1 sentences, 0 prompts and 1 seeds"),
    ({"foo": 1, "first_frame": B}, "there is no option first_frame, foo"),
  ],
)
def test_arguments_of_a_batch(pipe, options, message):
  refuse(lambda: pipe.sample_batch([CLIPS], **options), message)
  for batch in (None, 5, "abc"):
    refuse(lambda batch=batch: pipe.sample_batch(batch), "batch must be a list of sentences, each a list of clips, got")


def test_batches_of_nothing_and_of_generators(pipe):
  assert pipe.sample_batch([]) == []
  with unchecked():
    (found,) = pipe.sample_batch((iter(clips) for clips in [CLIPS]), seeds=iter([4]), num_inference_steps=1)
  np.testing.assert_allclose(found.latents, sample(pipe, seed=4).latents, atol=1e-4)


@pytest.mark.parametrize(
  "examples, queries, options, message",
  [
    ([A], [B], {}, "an even number of clips, got 1"),
    ([], [B], {}, "queries need the example pairs"),
    (None, [B], {}, "examples must be a list of clips"),
    ([A, A2[0]], [B], {}, "clips are uint8 arrays"),
    ([A, A2], None, {}, "queries must be clips, uint8 arrays (T, H, W, 3), got None"),
    ([A, A2], [B], {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ([A, A2], [B], {"seed": 1.5}, "seed must be a whole number"),
    ([A, A2], [B], {"num_frames": "5"}, "num_frames must be a whole number"),
    ([A, A2], [B], {"prompt": 5}, "prompt must be text"),
    ([A, A2], [B], {"foo": 1}, "there is no option foo"),
  ],
)
def test_queries_are_checked_before_they_are_iterated_over(pipe, examples, queries, options, message):
  refuse(lambda: pipe.sample_queries(examples, queries, **options), message)


@pytest.mark.parametrize(
  "examples, query, options, message",
  [
    (None, B, {}, "examples must be a list of clips"),
    ([A, A2], None, {}, "clips are uint8 arrays (T, H, W, 3)"),
    ([A, A2], B, {"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
    ([A, A2], B, {"num_frames": 5, "seed": None}, "seed must be a whole number"),
    ([A, A2], B, {"foo": 1}, "there is no option foo"),
  ],
)
def test_arguments_of_a_whole_video(pipe, examples, query, options, message):
  refuse(lambda: pipe.sample_video(examples, query, **options), message)


def test_clips_are_read_from_any_iterable_of_paths(pipe, tmp_path):
  paths = [write_image(tmp_path / f"{name}.png", size=(64, 64)) for name in "abc"]
  assert len(pipe.read_clips(path for path in paths)) == len(pipe.read_clips(list(map(str, paths)))) == 3
  for single in (paths[0], str(paths[0]), None, 5):
    refuse(lambda single=single: pipe.read_clips(single), "paths must be a list of paths of clips, got")
  refuse(lambda: pipe.read_clips([]), "paths must be those of one or more clips, got none")
  for path in (5, None, b"a.png", [str(paths[0])], A):
    refuse(lambda path=path: univid_jax.read_clip(path), "a clip is read from a path, got")
    refuse(lambda path=path: pipe.read_clips([path]), "a clip is read from a path, got")


@pytest.mark.parametrize(
  "options, message",
  [
    *(({name: value}, f"{name} must be True or False, got {value!r}") for value in ("no", 1, None)
      for name in ("merge_lora", "verify_weights", "lora_skip_unmatched", "offload_inactive")),
    ({"dtype": False}, "dtype must be one of float32, bfloat16, float16, got False"),
    ({"quantize": ""}, "quantize must be one of"),
    ({"lora": [None]}, "a LoRA is a path, with a weight path:weight or (path, weight), got None"),
    ({"lora": ""}, "a LoRA is a path"),
    ({"lora": ("x", "0.5")}, "the weight of the LoRA x must be a number, got '0.5'"),
    ({"lora": ("x", None)}, "the weight of the LoRA x must be a number, got None"),
    ({"lora": ("x", True)}, "the weight of the LoRA x must be a number, got True"),
    ({"lora_steps": 5}, "lora_steps must be a mapping from workdirs in lora to steps, got 5"),
    ({"lora_steps": {"x": 1}}, "lora_steps has x, which is not in lora (there is none)"),
    ({"lora": "y:0.5", "lora_steps": {"x": 1}}, "lora_steps has x, which is not in lora (y)"),
    ({"lora": "y", "lora_steps": {"y": 1}}, "lora_steps has a step of y, which is not the workdir of a run"),
    ({"accelerate": 5}, "accelerate must be a list of [EXPERT=]PATH[:WEIGHT][:KIND], got 5"),
    ({"mesh": {"data": 1}}, "mesh must be a jax.sharding.Mesh with the axes data, fsdp, tensor, context"),
    ({"mesh": Mesh(np.array(jax.devices()[:1]), ("x",))}, "makes it, got one with x"),
  ],
)  # fmt: skip
def test_arguments_of_loading(options, message):
  refuse(lambda: univid_jax.load_pipeline("small", **options), message)


@pytest.mark.parametrize("checkpoint", [None, 5, ["small"], ""])
def test_a_checkpoint_is_a_name_or_a_path(checkpoint):
  for call in (univid_jax.load_pipeline, Origin.resolve):
    refuse(lambda call=call: call(checkpoint), "checkpoint must be a path, or a built-in base (small), got")


def test_a_path_is_no_built_in_base(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match="no folder small; the built-in base is the text 'small', not a path"):
    univid_jax.load_pipeline(Path("small"))


@pytest.mark.parametrize("lora", ["missing:0.5", ("missing", 0.5), ("missing", np.float32(0.5)), [("missing", 1)]])
def test_forms_of_a_weighted_lora(lora):
  with pytest.raises(FileNotFoundError, match=r"no such file: missing$"):
    univid_jax.load_pipeline("small", lora=lora)


VIDEO = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)


@pytest.mark.parametrize(
  "frames",
  [VIDEO, jnp.asarray(VIDEO), list(VIDEO), LoadedClip(VIDEO), Sample(LATENTS, VIDEO)],
  ids=["array", "JAX", "list", "clip", "sample"],
)
def test_forms_of_frames_to_write(tmp_path, frames):
  for name in ("x.npy", "x.mp4", "x"):
    univid_jax.write_clip(tmp_path / name, frames)
    assert univid_jax.read_clip(tmp_path / name).frames.shape == VIDEO.shape
  assert np.array_equal(np.load(tmp_path / "x.npy"), VIDEO)


@pytest.mark.parametrize(
  "frames, message",
  [
    (VIDEO[0], "got uint8 (8, 8, 3); a single image is frames[None]"),
    (VIDEO / 255, "got float64 (3, 8, 8, 3)"),
    (VIDEO[:0], "got uint8 (0, 8, 8, 3)"),
    (VIDEO[..., :1], "got uint8 (3, 8, 8, 1)"),
    ([VIDEO[0], VIDEO[0, :4]], "all of one size"),
    (None, "got None"),
    ("x.png", "got 'x.png'"),
  ],
)
def test_other_frames_are_not_written(tmp_path, frames, message):
  for name in ("x.png", "x.mp4", "x.npy"):
    refuse(
      lambda name=name: univid_jax.write_clip(tmp_path / name, frames), "frames must be uint8 (T, H, W, 3)", message
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -1, "8", np.nan, np.inf, True, 1e-9, 1e9])
def test_other_frame_rates_are_not_written(tmp_path, fps):
  for name in ("x.gif", "x.mp4", "x.png"):
    refuse(lambda name=name: univid_jax.write_clip(tmp_path / name, VIDEO, fps=fps), "fps must be")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("noise_range", [(0.0, float("inf")), (0.2, 0.9)])
def test_noise_levels_do_not_depend_on_x64(objective, stratified, noise_range):
  path = FlowMatching(objective=objective, stratified=stratified, noise_range=noise_range)
  found = []
  for x64 in (False, True):
    with jax.enable_x64(x64):
      found.append([np.asarray(x) for x in path.sample(jax.random.key(3), jnp.full((8,), 100.0, jnp.float32))])
  for first, second in zip(*found):
    assert first.dtype == second.dtype == np.float32 and np.array_equal(first, second)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**40 + 1, -1, MAX_SEED])
def test_noise_of_samples_does_not_depend_on_x64(pipe, seed):
  found = []
  for x64 in (False, True):
    with jax.enable_x64(x64):
      video = pipe.sample_video([A, A2], np.repeat(B, 9, 0), num_frames=5, num_inference_steps=1, seed=seed)
      found.append((pipe.make_job(CLIPS, None, seed).noise, video._noise(1)))
  for first, second in zip(*found):
    assert first.dtype == second.dtype == np.float32 and np.array_equal(first, second)
