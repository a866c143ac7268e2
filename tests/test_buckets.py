"""Which paths may be in a bucket, as docs/formats.md lists them, and what those are told that may not."""

import contextlib
import json
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import univid_jax
from tests.commands import run_here
from tests.helpers import GOLDENS
from tests.stand_ins import Bucket, open_bucket
from tests.test_convert_destinations import small_lora
from univid_jax.checkpoints import saved
from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import digest_contents, read_names, verified, write_checksums
from univid_jax.checkpoints.lora.folder import read_lora_folder
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, count_files
from univid_jax.checkpoints.run import RunRecord, require_run, write_run
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import is_lora_run
from univid_jax.cli.sampling import plan_requests
from univid_jax.cli.verification import verify
from univid_jax.codecs.tokenizer import Tokenizer
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.convert.commands import convert_any, inspect
from univid_jax.convert.destination import check_destination
from univid_jax.core import bucket_files
from univid_jax.core.bucket_files import copy_file, copy_to_local, source_state
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import write_json
from univid_jax.core.lock import hold
from univid_jax.core.paths import bucket_errors, to_path
from univid_jax.data.cache import shard_writer
from univid_jax.data.cache.entries import Cache
from univid_jax.data.cache.shard_writer import pack_caches, repair_indices
from univid_jax.data.features import CACHE_NAMES, caches_folder
from univid_jax.data.fingerprint import read_fingerprint, write_fingerprint
from univid_jax.data.sources.open import open_data
from univid_jax.data.target_kinds import read_palette
from univid_jax.evaluation.generate import SentenceInfo, read_generated
from univid_jax.evaluation.run import is_evaluated
from univid_jax.inference.ratio_tables import TableKey, read_table, write_table
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.metrics_writer import MetricsWriter

PACKAGE = str(Path(univid_jax.__file__).parent)
WAN = GOLDENS / "tiny_wan"
# URLs that are not of a bucket.
OTHER = "https://host/x", "memory://x", "file:///x"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(bucket_files, "CACHE_FOLDER", str(tmp_path / "cache"))
  return open_bucket("x")


def upload(source: Path, target) -> str:
  for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
    if path.is_file():
      (target / path.relative_to(source) if source.is_dir() else target).write_bytes(path.read_bytes())
  return str(target)


def write_pairs(folder: Path) -> Path:
  rng = np.random.default_rng(0)
  for index in range(4):
    (folder / "invert" / str(index)).mkdir(parents=True)
    for name in ("source", "target"):
      picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
      picture.save(folder / "invert" / str(index) / f"{name}.png")
  return folder


@pytest.fixture
def lora(tmp_path):
  write_lora(tmp_path / "lo.safetensors", small_lora(), "comfyui")
  return tmp_path / "lo.safetensors"


def load_base(url):
  base = PretrainedCheckpoint.open(url)
  return base.load("transformer", mesh=make_mesh({"data": -1}))[1]


class TestRead:
  def test_loras(self, bucket, lora):
    url = upload(lora, bucket / "lo.safetensors")
    assert read_lora(url).changes.keys() == read_lora(lora).changes.keys() and "LoRA" in inspect(url)

  def test_a_base_in_one_file(self, bucket):
    url = upload(Path(locate("small")), bucket / "small")
    assert "small" in inspect(url) and load_base(url).keys() == load_base("small").keys()
    assert not [line for found in verify(url, write=False) for line in found.damaged]

  @pytest.mark.parametrize("key, folder", [("pairs", "data"), ("folder", "data/invert/0")])
  def test_data(self, bucket, tmp_path, key, folder):
    upload(write_pairs(tmp_path / "data"), bucket / "data")
    data = open_data(override(tiny(), {f"data.{key}": str(bucket / folder)}))
    assert sum(map(len, data.sources.values())) and not data.dropped

  def test_caches(self, bucket):
    assert caches_folder(override(tiny(), {"data.cache": str(bucket)}), "runs/x") == bucket


class TestWritten:
  @pytest.mark.parametrize("to", ["musubi", "univid"])
  def test_lora_files(self, bucket, lora, to):
    convert_any(str(lora), str(bucket / f"{to}.safetensors"), to=to)
    assert read_lora(bucket / f"{to}.safetensors").changes.keys() == read_lora(lora).changes.keys()

  def test_locks(self, bucket):
    with hold(bucket / "run"):
      assert (bucket / "run" / ".lock-0").exists()
    assert not (bucket / "run" / ".lock-0").exists()


def find_cached(url):
  return "key" in Cache(url, "weights")


def pack(url):
  repair_indices(url)
  pack_caches(url)


# What reads paths that may be in a bucket.
READERS = {
  "file": copy_file,
  "folder": copy_to_local,
  "state": source_state,
  "checksums": lambda url: digest_contents(url, listed_in=None),
  "listed checksums": read_names,
  "LoRA": read_lora,
  "LoRA folder": read_lora_folder,
  "LoRA run": is_lora_run,
  "base": PretrainedCheckpoint.open,
  "run": require_run,
  "inspection": inspect,
  "verification": lambda url: list(verify(url, write=False)),
  "destination": lambda url: check_destination(url, needed=1, force=True),
  "data": lambda url: open_data(override(tiny(), {"data.pairs": url})),
  "fingerprint": read_fingerprint,
  "tokenizer": Tokenizer,
  "palette": read_palette,
  "cache": find_cached,
  "packing": pack,
  "metrics": lambda url: MetricsWriter(url, start_step=0),
  "samples": lambda url: next(read_generated(to_path(url), 1)),
}


@pytest.mark.parametrize("name", READERS)
def test_errors_of_buckets_are_os_errors(bucket, monkeypatch, name):
  """Also where a library raises others; commands show them in one line."""

  def fail(*args, **kwargs):
    raise RuntimeError("Service Unavailable\n503")

  for method in ("_open", "info", "ls", "exists", "isfile", "isdir", "modified"):
    monkeypatch.setattr(Bucket, method, fail)
  with pytest.raises(OSError, match=r"RuntimeError: Service Unavailable: 's3://bucket/x/y.*'$"):
    READERS[name](str(bucket / "y"))


def use_run(folder):
  write_run(folder, RunRecord(tiny(), (), "0"))
  write_fingerprint(folder, {})
  write_checksums(folder)
  write_json(folder / "eval.json", {"steps": 1})
  assert read_fingerprint(folder) == {} and not is_evaluated(tiny(), folder) and not is_lora_run(folder)
  assert count_files(folder) == 7 and require_run(folder).version == "0"
  (found, *_) = verify(str(folder), write=False)
  assert found.num_files and not found.is_unverified and not found.damaged


def use_cache(folder):
  name = folder / CACHE_NAMES[0]
  for key in "ab":
    Cache(name, "weights").put(key, np.zeros(3))
  repair_indices(folder)
  assert pack_caches(folder, remove_files=True).num_removed == 2
  cache = Cache(name, "weights")
  assert "a" in cache and cache.get("b") is not None and cache.get("c") is None
  list(verify(str(name), write=False))


def use_files(folder):
  key = TableKey(
    weights={}, solver="", sigmas=[1], guidance_scales=[], guidance_range=[0, 1], attention="", context_timestep=""
  )
  write_table(folder, key, [[1.0]])
  assert read_table(folder, key) == [[1.0]] and len(read_palette(str(folder / "palette.txt"))) == 1
  convert_any(str(folder / "lo.safetensors"), str(folder / "musubi.safetensors"), to="musubi", force=True)
  assert "LoRA" in inspect(str(folder / "lo.safetensors"))
  next(read_generated(folder, 1))


def place_of_call():
  """Returns the lines of the package and of `use_...` that the caller runs in."""
  frames = (frame for frame, _ in traceback.walk_stack(None))
  return tuple(f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in frames if PACKAGE in frame.f_code.co_filename
               or frame.f_code.co_name.startswith("use_"))  # fmt: skip


@pytest.mark.parametrize("use", [use_run, use_cache, use_files])
def test_any_call_of_a_bucket_may_fail(bucket, lora, monkeypatch, use):
  """With an error that is no OSError; nothing goes on as if the bucket were empty."""
  places, failing = dict.fromkeys([()]), None

  def wrap(method):
    def call(*args, **kwargs):
      places[place := place_of_call()] = None
      if place == failing:
        raise RuntimeError("503")
      return method(*args, **kwargs)

    return call

  def run():
    folder = open_bucket("x")
    upload(lora, folder / "lo.safetensors")
    (folder / "palette.txt").write_text("0 0 0")
    with (folder / "00000.npz").open("wb") as file:
      np.savez(file, info=json.dumps(dict.fromkeys(SentenceInfo.__annotations__)), codec=0)
    use(folder)

  monkeypatch.setattr(shard_writer, "CACHE_NAMES", CACHE_NAMES[:1])
  for name in ("_open", "info", "ls", "modified", "rm", "rm_file"):
    monkeypatch.setattr(Bucket, name, wrap(getattr(Bucket, name)))
  run()
  for place in list(places)[1:]:  # the first is of the test itself
    failing = place
    with contextlib.suppress(OSError):
      run()


@pytest.mark.parametrize("error, found", [(OSError("Forbidden"), OSError), (FileNotFoundError("x"), FileNotFoundError)])
def test_errors_without_a_path_get_one(bucket, error, found):
  with pytest.raises(found, match=f"{error}: '{bucket}'") as raised, bucket_errors(bucket):
    raise error
  assert raised.value.filename == str(bucket) and raised.value.errno


def test_a_bucket_that_does_not_answer_is_no_damage(bucket, monkeypatch):
  (bucket / "x.bin").write_bytes(b"1")
  write_checksums(bucket)
  read = Bucket._open

  def fail(self, path, *args, **kwargs):
    if path.endswith(".bin"):
      raise RuntimeError("503")
    return read(self, path, *args, **kwargs)

  monkeypatch.setattr(Bucket, "_open", fail)
  with pytest.raises(OSError, match="RuntimeError: 503"), verified(bucket, enabled=True):
    pass


def test_checkpoints_of_a_bucket_that_does_not_answer_are_not_none(bucket, monkeypatch):
  monkeypatch.setattr(saved, "make_absolute", to_path)  # which allows gs:// alone
  assert SavedCheckpoints(str(bucket)).steps == []
  monkeypatch.setattr(Bucket, "info", mock.Mock(side_effect=RuntimeError("503")))
  with pytest.raises(OSError, match="RuntimeError: 503"):
    SavedCheckpoints(str(bucket)).steps  # noqa: B018


def test_what_is_no_palette(bucket):
  (bucket / "palette.txt").write_bytes(b"\xff\xfe")
  with pytest.raises(UserError, match=r"palette\.txt is not a palette"):
    read_palette(str(bucket / "palette.txt"))


LOCAL = "is in a bucket: give a path on this machine"
GOOGLE = "checkpoints and their arrays are local or in gs://"

# What may not be in a bucket, or not in this one: a call that is given a URL, and what it answers.
REFUSED = {
  "read_clip": (univid_jax.read_clip, LOCAL),
  "write_clip": (lambda url: univid_jax.write_clip(url, np.zeros((1, 8, 8, 3), np.uint8)), LOCAL),
  "sample --out": (lambda url: plan_requests(["a", "b", "c"], [], url), LOCAL),
  "export": (lambda url: convert_any("small", url, to="original"), LOCAL),
  "release": (lambda url: inspect(upload(WAN, to_path(url))), LOCAL),
  "file of a release": (
    lambda url: inspect(upload(WAN / "diffusion_pytorch_model.safetensors", to_path(f"{url}.safetensors"))),
    LOCAL,
  ),
  "LoRA folder": (lambda url: convert_any("lo.safetensors", url), GOOGLE),
  "base": (lambda url: convert_any(str(WAN), url), GOOGLE),
  "workdir of a sample": (univid_jax.load_pipeline, GOOGLE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(bucket, lora, name):
  call, message = REFUSED[name]
  before = sorted(path.name for path in Path().iterdir() if path.name != "cache")
  with pytest.raises(UserError, match=message) as caught:
    call(str(bucket / "y"))
  assert "\n" not in str(caught.value) and str(caught.value).startswith(str(bucket / "y"))
  assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == before


@pytest.mark.parametrize("name", ["LoRA folder", "base"])
def test_a_refused_conversion_replaces_nothing(bucket, lora, name):
  source = {"LoRA folder": str(lora), "base": str(WAN)}[name]
  (bucket / "y" / "old").write_bytes(b"0")
  with pytest.raises(UserError, match=GOOGLE):
    convert_any(source, str(bucket / "y"), force=True)
  assert [path.name for path in (bucket / "y").iterdir()] == ["old"]


def test_folders_named_by_numbers_are_verified(bucket, lora):
  """As those of a cache, whose entries are in folders named by two hexadecimal digits."""
  upload(lora, bucket / "y" / "05" / "lo.safetensors")
  assert [found.path.name for found in verify(str(bucket / "y"), write=False)] == ["05"]


ANY_URL = {
  "read_clip": univid_jax.read_clip,
  "write_clip": lambda url: univid_jax.write_clip(url, np.zeros((1, 8, 8, 3), np.uint8)),
  "checkpoint": univid_jax.load_pipeline,
  "lora": lambda url: univid_jax.load_pipeline("small", lora=url),
  "source": lambda url: convert_any(url, "y"),
  "destination": lambda url: convert_any("small", url, to="original"),
  "verify": lambda url: list(verify(url, write=False)),
  "pairs": lambda url: open_data(override(tiny(), {"data.pairs": url})),
  "folder": lambda url: open_data(override(tiny(), {"data.folder": url})),
  "cache": lambda url: caches_folder(override(tiny(), {"data.cache": url}), "runs/x"),
}


@pytest.mark.parametrize("name", ANY_URL)
@pytest.mark.parametrize("url", OTHER)
def test_other_urls(bucket, name, url):
  with pytest.raises(UserError, match=rf"^(config\.data\.\w+: )?{url}: paths are local or in a bucket"):
    ANY_URL[name](url)
  assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["checkpoint", "lora", "source", "verify", "pairs"])
def test_a_package_that_is_missing(bucket, name, monkeypatch):
  def refuse(scheme):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr("fsspec.get_filesystem_class", refuse)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  message = r"^(config\.data\.pairs: )?gs://b/x: Please install gcsfs .*: pip install -e .*\[gcs\]'"
  with pytest.raises(UserError, match=message):
    ANY_URL[name]("gs://b/x")


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate"])
def test_a_workdir_in_another_bucket(command, monkeypatch, capfd):
  """Is refused for its scheme, whether or not the package is installed that would read it."""
  monkeypatch.setattr("fsspec.get_filesystem_class", lambda scheme: pytest.fail(f"{scheme} is looked up"))
  assert run_here(f"univid_jax.{command}", "--workdir=s3://bucket/run") > 0
  assert capfd.readouterr().err == "error: s3://bucket/run: workdirs are local or in gs://\n"


@pytest.mark.parametrize("workdir", ["s3://bucket/x/run", "memory://run"])
def test_workdirs(bucket, workdir, capfd):
  """Before anything is trained, and without a traceback."""
  assert run_here("univid_jax.train", f"--workdir={workdir}") == 1
  error = capfd.readouterr().err
  assert f"error: {workdir}" in error and "internal" not in error and "Traceback" not in error
