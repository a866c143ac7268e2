"""Many queries after one example pair: batches equal single samples, results are kept, processes share the work."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.clip_files import write_video
from tests.commands import SMALL, finish, free_port, run_command, start_command
from tests.helpers import give_prompts, random_pipeline
from univid_jax.cli.queries import QueryRunner
from univid_jax.cli.requests import RequestRunner
from univid_jax.cli.sampling import SamplingArguments, plan_requests
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.inference import batch_size
from univid_jax.inference.batch_size import choose_batch_size, spread
from univid_jax.inference.plan import SamplingOptions
from univid_jax.parallel.mesh import make_mesh

STEPS = SamplingArguments(steps=SamplingOptions(num_inference_steps=3))


@pytest.fixture(scope="module")
def pipeline(tiny_config):
  return random_pipeline(tiny_config, make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder with an example pair, seven images and three videos to query."""
  folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
  for name in ("a", "a2", *(f"q/image_{i}" for i in range(7))):
    (folder / name).parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{name}.png")
  for i, count in enumerate((5, 5, 9)):
    write_video(folder / "q" / f"video_{i}.mp4", count, shade=40 * i, size=(16, 16))
  return folder


def requests_for(files: Path, out: Path, *queries: str):
  return plan_requests([str(files / f"{name}.png") for name in ("a", "a2")], queries or [str(files / "q")], str(out))


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
  "attention, solver, guidance_scale, devices",
  [pytest.param("full", "euler", 1.0, 1, marks=pytest.mark.long), ("context_causal", "unipc", 2.0, 8)],
)
def test_batches_equal_single_samples(tiny_config, attention, solver, guidance_scale, devices):
  """In any order, with any size of the batches; also over several devices, and with a cached context."""
  config = override(tiny_config, {"model.attention": attention})
  pipeline = give_prompts(random_pipeline(config, make_mesh({"data": -1}, jax.devices()[:devices])))
  rng = np.random.default_rng(0)
  a, a2, *queries = rng.integers(0, 256, (7, 1, 16, 16, 3)).astype(np.uint8)
  options = dict(num_inference_steps=3, solver=solver, guidance_scale=guidance_scale, negative_prompt="no", seed=5)
  alone = [pipeline.sample([a, a2, query], **options).latents for query in queries]
  for size, order in ((None, 1), (2, -1), (1, 1)):
    batch = [
      sample.latents for sample in pipeline.sample_queries([a, a2], queries[::order], batch_size=size, **options)
    ]
    assert max(np.abs(x - y).max() for x, y in zip(batch[::order], alone)) < 1e-5, (size, order)


def test_example_pairs_are_encoded_once_and_one_program_serves_all(pipeline, monkeypatch):
  rng = np.random.default_rng(0)
  a, a2, *queries = rng.integers(0, 256, (9, 1, 16, 16, 3)).astype(np.uint8)
  encoded = []
  encode = pipeline.encode
  monkeypatch.setattr(pipeline, "encode", lambda frames: encoded.append(frames) or encode(frames))
  steps = []
  options = dict(batch_size=3, num_inference_steps=2)
  list(pipeline.sample_queries([a, a2], queries[:3], **options))
  programs = [pipeline.sampler.prepare, *pipeline.sampler._steps.values()]
  before = [program._cache_size() for program in programs]
  encoded.clear()
  results = pipeline.sample_queries([a, a2], iter(queries), progress=steps.append, **options)
  assert len(list(results)) == 7
  assert sum(any(frames is clip for clip in (a, a2)) for frames in encoded) == 2
  assert steps == [1.5, 3, 4.5, 6, 6.5, 7]
  assert [program._cache_size() for program in programs] == before, "also for the last batch, which is not full"


def test_wrong_queries(pipeline):
  clips = [np.zeros((1, 16, 16, 3), np.uint8)] * 2
  assert list(pipeline.sample_queries(clips, [])) == []
  with pytest.raises(UserError, match="at one size and length: got latents"):
    other = np.zeros((1, 16, 24, 3), np.uint8)
    list(pipeline.sample_queries(clips, [clips[0], other], batch_size=2, num_inference_steps=1))
  with pytest.raises(UserError, match="queries need the example pairs"):
    list(pipeline.sample_queries([], clips))


@pytest.mark.long
def test_files_are_those_of_single_requests(pipeline, files, tmp_path, caplog):
  """Images, videos, and a video longer than the model's clips; the bucket of each length has one program."""
  runner = RequestRunner(pipeline, pipeline.clip_format, STEPS, {}, grid=True)
  requests = requests_for(files, tmp_path / "batches")
  with caplog.at_level(logging.INFO, "univid_jax"):
    lines = list(QueryRunner(runner).run(requests))
  assert len(lines) == 10 and all(line.startswith("wrote ") for line in lines)
  found = [message for message in caplog.messages if "at once" in message]
  assert found == [
    "7 queries of 16 x 16 pixels (width x height), 1 frame each, 7 at once",
    "2 queries of 16 x 16 pixels (width x height), 5 frames each, 2 at once",
  ]
  for request in requests_for(files, tmp_path / "alone"):
    runner.run(request)
  batches, alone = contents(tmp_path / "batches"), contents(tmp_path / "alone")
  assert batches.keys() == alone.keys()
  assert all(batches[name] == content for name, content in alone.items() if name.endswith(".json"))
  for name in (name for name in alone if name.endswith(".png")):
    shown, expected = (np.asarray(Image.open(tmp_path / way / name)).astype(int) for way in ("batches", "alone"))
    assert np.abs(shown - expected).max() <= 1


def test_what_is_missing_is_sampled(pipeline, files, tmp_path):
  """After a kill in the middle of a result, or with other settings; to the same bytes."""
  runner = RequestRunner(pipeline, pipeline.clip_format, STEPS, {})
  requests = requests_for(files, tmp_path / "out")
  list(QueryRunner(runner, 3).run(requests))
  first = contents(tmp_path / "out")
  for name in ("image_1.json", "image_5.json", "image_5.png", "video_0.mp4", "video_2.json"):
    (tmp_path / "out" / name).unlink()
  lines = list(QueryRunner(runner, 3).run(requests))
  assert sum(line.startswith("wrote ") for line in lines) == 4
  assert (
    lines.count("kept 5 results of an earlier command") == 1 and lines.count("kept 1 result of an earlier command") == 1
  )
  assert contents(tmp_path / "out") == first
  assert not any(line.startswith("wrote ") for line in QueryRunner(runner, 3).run(requests))
  other = RequestRunner(pipeline, pipeline.clip_format, dataclasses.replace(STEPS, seed=1), {})
  assert sum(line.startswith("wrote ") for line in QueryRunner(other, 3).run(requests)) == 10


def test_processes_share_queries(pipeline, files, tmp_path, monkeypatch):
  runner = RequestRunner(pipeline, pipeline.clip_format, STEPS, {})
  requests, written = requests_for(files, tmp_path / "out"), []
  for process in range(2):
    monkeypatch.setattr("univid_jax.cli.queries._place", lambda process=process: (process, 2))
    written.append({line.rpartition("/")[2] for line in QueryRunner(runner).run(requests)})
  assert not written[0] & written[1] and len(written[0] | written[1]) == 10
  assert all(any(name.startswith(kind) for name in part) for part in written for kind in ("image", "video"))


def test_warm_up_compiles_what_queries_need(tiny_config, files, tmp_path):
  pipeline = random_pipeline(tiny_config, make_mesh({}, jax.devices()[:1]))
  runner = RequestRunner(pipeline, pipeline.clip_format, STEPS, {})
  queries = [str(files / "q" / f"image_{i}.png") for i in range(4)]
  requests = requests_for(files, tmp_path / "out", *queries)
  assert QueryRunner(runner).warm_up(requests) == "compiled the programs of 1 kind of queries; nothing was sampled"
  assert not (tmp_path / "out").exists()
  programs = [pipeline.sampler.prepare, *pipeline.sampler._steps.values()]
  before = [program._cache_size() for program in programs]
  list(QueryRunner(runner).run(requests))
  assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
  "count, most, shards, expected",
  [(33, 32, 1, 17), (32, 32, 1, 32), (3, 32, 1, 3), (7, 3, 1, 3), (10, 32, 8, 16), (10, 8, 8, 8), (1, 1, 4, 4)],
)
def test_batches_are_equally_full(count, most, shards, expected):
  assert spread(count, most, shards) == expected


def test_batches_are_sized_by_the_forecast(pipeline, monkeypatch):
  """As many as fit in the free memory, by the compiler's figures, which grow with the batch."""
  clip = np.zeros((1, 16, 16, 3), np.uint8)
  job = pipeline.make_job([clip] * 3, None, 0)
  rows, plan = pipeline.pack_job(job, [pipeline.embed("")]), pipeline.plan(2)
  needed = {size: batch_size.step_memory(pipeline, rows, plan, size) for size in (2, 4)}
  assert 0 < needed[2] < needed[4]
  for free, expected in ((None, 8), (1 << 40, 8), (needed[4] / batch_size.MEMORY_SHARE, 4), (1, 1)):
    monkeypatch.setattr(batch_size, "free_memory", lambda device, free=free: free)
    assert choose_batch_size(pipeline, rows, plan, count=8) == expected
  monkeypatch.setattr(batch_size, "MAX_TOKENS", 3 * rows[0].tokens.shape[1])
  assert choose_batch_size(pipeline, rows, plan, count=8) == 1, "memory decides if it is less"


@pytest.mark.long
def test_two_processes_sample_all_queries(files, tmp_path):
  """With the command: each writes its share, as one process alone does."""
  small = [*SMALL, "--config.num_steps=1", "--config.eval.sentences_per_case=0", f"--workdir={tmp_path / 'run'}"]
  assert run_command("univid_jax.train", *small).returncode == 0
  common = [f"--checkpoint={tmp_path / 'run'}", f"--clips={files / 'a.png'},{files / 'a2.png'}", "--steps=2"]
  common.append(f"--queries={files / 'q'}")
  alone = run_command("univid_jax.sample", *common, f"--out={tmp_path / 'alone'}")
  assert alone.returncode == 0, alone.stderr
  group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
  shared = [*common, f"--out={tmp_path / 'shared'}", *group]
  both = [finish(each) for each in [start_command("univid_jax.sample", *shared, f"--process_id={i}") for i in (0, 1)]]
  assert [done.returncode for done in both] == [0, 0], both
  names = contents(tmp_path / "alone").keys()
  assert contents(tmp_path / "shared").keys() == names and len(names) == 20
  records = [json.loads((tmp_path / way / "image_0.json").read_text()) for way in ("alone", "shared")]
  assert records[0] == records[1]
