"""Flags, exit codes, error lines and log files, shared by all commands."""

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import time

import pytest

from tests.commands import SMALL, finish, free_port, start_command, start_python
from univid_jax.cli import app
from univid_jax.cli.compilation import enable_compilation_cache
from univid_jax.cli.flags import CommandFlags
from univid_jax.cli.path_flags import PATH_KEYS
from univid_jax.config.boundary import to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import DivergedError, Interrupted, UserError
from univid_jax.diffusion.step_cache import StepCache

COMMANDS = ("train", "prepare", "sample", "evaluate", "forecast", "demo", "convert.__main__")


class Command:
  """A command that raises `error`; with a config and a workdir."""

  def __init__(self, error: BaseException | None = None):
    self.flags = CommandFlags("Does nothing.")
    self.config = self.flags.config()
    self.workdir = self.flags.workdir("Folder")
    self.ran = 0

    @app.command(self.flags)
    def main() -> None:
      self.ran += 1
      if error:
        raise error

    self._main = main

  def __call__(self, *arguments: str) -> int:
    return self._main(["command", *map(str, arguments)])


def raise_in_library(error: Exception) -> None:
  """Raises as if from a module outside this package."""
  exec("raise error", {"__package__": "library", "error": error})


class TestExitCodes:
  @pytest.mark.parametrize(
    "error, code, line",
    [
      (None, 0, ""),
      (UserError("config.seed must be\n at least 0"), 1, "error: config.seed must be at least 0"),
      (DivergedError("the loss is not finite"), 1, "error: the loss is not finite"),
      (FileNotFoundError(errno.ENOENT, "No such file", "clip.mp4"), 1, "error: No such file: clip.mp4"),
      (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
      (MemoryError(), 1, "error: not enough memory (MemoryError): use fewer frames"),
      (
        RuntimeError("RESOURCE_EXHAUSTED: 4 GB\nmore"),
        1,
        "error: not enough memory (RuntimeError: RESOURCE_EXHAUSTED: 4 GB)",
      ),
      (Interrupted("stopped by SIGTERM at step 3"), 75, "stopped by SIGTERM at step 3"),
      (Interrupted("stopped by SIGINT at step 3", 130), 130, "stopped by SIGINT at step 3"),
      (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
  )
  def test_without_a_traceback(self, error, code, line, capfd, tmp_path):
    assert Command(error)(f"--workdir={tmp_path}") == code
    stderr = capfd.readouterr().err
    assert stderr.startswith(line) and stderr.count("\n") == (1 if line else 0) and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())

  def test_help(self, capfd):
    command = Command()
    assert command("--help") == 0 and command("-h", "--nonsense") == 0 and not command.ran
    text = capfd.readouterr().out
    assert "Does nothing." in text and "--workdir" in text and "wan_1_3b" in text and "--clips" not in text

  @pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["--workdir"], ["word"], ["--config.seed=-1"], ["--config=x.py"]]
  )
  def test_wrong_flags(self, arguments, capfd):
    command = Command()
    assert command(*arguments) == 2 and not command.ran
    stderr = capfd.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1

  def test_closed_streams_and_names_that_are_not_utf8(self):
    """What cannot be printed is escaped, or goes nowhere: a progress bar without a place ends no command."""
    script = (
      "import os, tqdm; from univid_jax.cli import app, flags as command_flags\n"
      "flags = command_flags.CommandFlags('Prints.')\n"
      "@app.command(flags)\n"
      "def main():\n"
      "  list(tqdm.tqdm(range(3)))\n"
      "  print(os.fsdecode(b'caf\\xe9'))\n"
      "raise SystemExit(main())"
    )
    for redirections, out in (("2>&-", "caf\\udce9\n"), (">&-", ""), (">&- 2>&-", "")):
      command = f"{sys.executable} -c {shlex.quote(script)} {redirections}"
      done = subprocess.run(command, shell=True, capture_output=True)
      assert done.returncode == 0 and done.stdout.decode() == out, done

  def test_logging_is_as_before_afterwards(self):
    loggers = logging.getLogger(), logging.getLogger("univid_jax")
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    assert Command()() == 0 and Command(UserError("wrong"))() == 1
    assert before == [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]

  def test_verbosity_prints_the_traceback(self, capfd):
    assert Command(UserError("wrong"))("--verbosity=1") == 1
    assert "Traceback" in capfd.readouterr().err


class TestInternalErrors:
  """One line that names a log file with the traceback."""

  def log_of(self, capfd) -> str:
    line = capfd.readouterr().err
    assert line.startswith("error: internal error (") and line.count("\n") == 1
    return line.split("the traceback is in ")[1].strip()

  @pytest.mark.parametrize("error", [ValueError("of JAX\nlong"), RuntimeError(), TypeError("x")], ids=repr)
  def test_in_the_workdir(self, error, capfd, tmp_path):
    assert Command(error)(f"--workdir={tmp_path / 'run'}", "--config.seed=7") == 1
    path = self.log_of(capfd)
    assert os.path.dirname(path) == str(tmp_path / "run" / "logs")
    with open(path) as log:
      text = log.read()
    assert "Traceback" in text and repr(error).split("(")[0] in text and "--config.seed=7" in text and "jax" in text

  def test_in_the_temporary_folder_if_the_workdir_cannot_be_written(self, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for workdir in ("/proc/nowhere", "gs://bucket/run"):
      assert Command(ValueError("x"))(f"--workdir={workdir}") == 1
      path = self.log_of(capfd)
      assert os.path.dirname(path) == str(tmp_path) and os.path.getsize(path)
      os.remove(path)

  def test_an_os_error_of_a_library_without_a_file_name(self, capfd, tmp_path):
    try:
      raise_in_library(ConnectionError("reset"))
    except ConnectionError as error:
      assert Command(error)(f"--workdir={tmp_path}") == 1
    with open(self.log_of(capfd)) as log:
      assert "ConnectionError: reset" in log.read()


def test_status_messages_are_plain_lines_above_progress_bars(tmp_path):
  script = textwrap.dedent("""
    import logging, sys
    from univid_jax.cli import app, distributed
    from univid_jax.cli.flags import CommandFlags

    @app.command(flags := CommandFlags(""))
    def main():
      import absl.logging
      from tqdm import tqdm
      with tqdm(total=2) as bar:
        logging.getLogger("univid_jax.data").info("status of %s", "this package")
        logging.getLogger("library").warning("warning of a library")
        absl.logging.warning("warning of a library")
        logging.getLogger("library").error("error of a library")
        absl.logging.error("error of another")
        distributed._hide_status(2)
        logging.getLogger("univid_jax.data").info("status of process 2")
        logging.getLogger("univid_jax.data").warning("a warning")

    sys.exit(main())
  """)
  done = finish(start_python("-c", script))
  lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "0/2" not in line]
  expected = ["status of this package", "error of a library", "error of another", "process 2: a warning"]
  assert lines == expected and done.returncode == 0


class TestFlags:
  def test_overrides_are_keys_of_the_config(self):
    command = Command()
    command("--config=small", "--config.seed=3", "--config.flow.shift", "2")
    assert command.flags.config_name == "small" and command.flags.config_overrides == ["seed", "flow.shift"]

  def test_all_commands_can_be_imported_together_without_side_effects(self):
    """No flag is defined twice, no global state changes, and JAX is not imported."""
    script = textwrap.dedent(f"""
      import gc, importlib, logging, os, sys
      import absl.logging, ml_collections.config_flags
      from absl.flags import FLAGS

      def state():
        root, variables = logging.getLogger(), os.environ.copy()
        verbosity = absl.logging.get_verbosity()
        return sorted(FLAGS), FLAGS.is_gnu_getopt(), verbosity, root.level, list(root.handlers), variables

      before = state()
      for name in {COMMANDS!r}:
        importlib.import_module("univid_jax." + name)
      assert before == state() and gc.isenabled()
      assert not {{"jax", "flax", "grain", "torch"}} & set(sys.modules)
    """)
    done = finish(start_python("-c", script))
    assert done.returncode == 0, done.stderr

  @pytest.mark.parametrize(
    "name", ["tiny", "wan_1_3b", "configs/video_tasks.py", "./configs/video_tasks.py:wan_1_3b"], ids=str
  )
  def test_presets_from_anywhere(self, name, tmp_path, monkeypatch):
    """In a clone and in a folder without configs/ alike."""
    expected = "wan_1_3b" if "wan" in name else "tiny"
    for folder in (os.getcwd(), tmp_path):
      monkeypatch.chdir(folder)
      command = Command()
      assert command(f"--config={name}", "--config.num_steps=7") == 0
      assert command.config.value.name == expected and command.config.value.num_steps == 7
      assert command.workdir.value == f"runs/{expected}"

  def test_folders_of_other_projects_do_no_harm(self, tmp_path, monkeypatch):
    for name in ("configs", "tools"):
      (tmp_path / name).mkdir()
      (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "configs" / "video_tasks.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    command = Command()
    assert command() == 0 and command.config.value.name == "tiny"

  def test_a_config_of_ones_own(self, tmp_path, capfd):
    path = tmp_path / "mine.py"
    path.write_text(
      "from univid_jax.config.presets import get_config as preset\n"
      "def get_config(steps='5'):\n  config = preset()\n  config.num_steps = int(steps)\n  return config\n"
    )
    command = Command()
    for argument, steps in (("", 5), (":9", 9)):
      assert command(f"--config={path}{argument}", "--config.seed=3") == 0
      assert command.config.value.num_steps == steps and command.config.value.seed == 3
    path.write_text("from univid_jax.config.presets import tiny as get_config")
    assert command("--config.seed=3", f"--config={path}") == 0 and command.config.value.seed == 3
    for content, message in (
      ("x = 1", "has no function get_config()"),
      ("def get_config(:", "cannot be loaded: SyntaxError"),
      ("def get_config():\n  return {}", "must return a ConfigDict or a RunConfig, got dict"),
    ):
      path.write_text(content)
      assert command(f"--config={path}") == 2
      assert message in capfd.readouterr().err

  @pytest.mark.parametrize(
    "key, text, expected",
    [
      ("validation.accelerate", "a.safetensors:0.5:lightx2v", ("a.safetensors:0.5:lightx2v",)),
      ("validation.accelerate", "high=/x/a b.st,low=/x/b.st", ("high=/x/a b.st", "low=/x/b.st")),
      ("validation.accelerate", "('a', 'b')", ("a", "b")),
      ("validation.accelerate", "", ()),
      ("validation.accelerate", "()", ()),
      ("data.buckets", "480x832,832x480", ("480x832", "832x480")),
      ("data.buckets", "('480x832',)", ("480x832",)),
      ("validation.accelerate", "123", ("123",)),
      ("lora.targets", "q,ffn.0", ("q", "ffn.0")),
      ("lora.targets", "q, k,", ("q", "k")),
      ("lora.targets", "(q,k)", ("q", "k")),
      ("lora.targets", "[q, ffn.0]", ("q", "ffn.0")),
      ("lora.targets", "(q)", ("q",)),
      ("lora.targets", "[qk],blocks.[01].v", ("[qk]", "blocks.[01].v")),
      ("lora.targets", "[qk]", ("[qk]",)),
      ("lora.targets", "[[qk],v]", ("[qk]", "v")),
      ("lora.targets", "[qk],[v]", ("[qk]", "[v]")),
      ("lora.targets", "('q',k)", ("q", "k")),
      ("data.buckets", "(480x832,832x480)", ("480x832", "832x480")),
      ("validation.accelerate", "[high=/x/a(1).st,low=/x/b(1).st]", ("high=/x/a(1).st", "low=/x/b(1).st")),
      ("validation.accelerate", "/x/a(1).st,/x/b(1).st", ("/x/a(1).st", "/x/b(1).st")),
      ("validation.sigmas", "0.5,1", (0.5, 1)),
    ],
  )
  @pytest.mark.parametrize("separate", [False, True])
  def test_lists_need_no_quotes(self, key, text, expected, separate):
    command = Command()
    words = [f"--config.{key}", text] if separate else [f"--config.{key}={text}"]
    assert command(*words, "--config.seed=3") == 0 and command.config.value.seed == 3
    section, _, name = key.partition(".")
    assert getattr(getattr(command.config.value, section), name) == expected

  def test_words_and_flags_in_any_order(self):
    flags = CommandFlags("", max_arguments=2)
    to = flags.string("to", None, "")
    flags.parse(["command", "a", "--to=x", "b"])
    assert list(flags.arguments) == ["a", "b"] and to.value == "x"
    with pytest.raises(UserError, match="unexpected argument 'c'"):
      flags.parse(["command", "a", "b", "c"])
    assert to.value is None  # nothing remains of an earlier command line

  def test_home_is_expanded_in_paths(self, monkeypatch, tmp_path):
    """Shells expand ~ only where a word begins, not in --NAME=~/x; ./~ and buckets stay as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = CommandFlags("", max_arguments=3)
    path, lora = flags.path("out", None, ""), flags.lora()
    flags.parse(["command", "~/a", "./~/b", "gs://c", "--out=~/x y/", "--lora=~/a:0.5,high=~/b,small,gs://c/~"])
    assert list(flags.arguments) == [f"{tmp_path}/a", "./~/b", "gs://c"] and path.value == f"{tmp_path}/x y/"
    assert lora.value == [f"{tmp_path}/a:0.5", f"high={tmp_path}/b", "small", "gs://c/~"]

  def test_home_is_expanded_in_the_config(self, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(
      "from univid_jax.config.presets import get_config as preset\n"
      "def get_config():\n  config = preset()\n  config.data.pairs = '~/pairs'\n  return config\n"
    )
    command = Command()
    words = ["--config.init_from=small", "--config.validation.accelerate=high=~/a:0.5,b", "--workdir=~/run"]
    assert command("--config=~/own.py", *words) == 0 and command.workdir.value == f"{tmp_path}/run"
    config = command.config.value
    assert (config.init_from, config.data.pairs) == ("small", f"{tmp_path}/pairs")
    assert config.validation.accelerate == (f"high={tmp_path}/a:0.5", "b")

  def test_keys_that_are_paths(self):
    """All whose default is empty, but for names; new ones have to be added."""

    def empty(values, prefix=""):
      for name, value in values.items():
        yield from empty(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name] * (value == "")

    names = {"model.variant", "data.tfds.name", "data.tfds.task", "data.tfds.test_split"}
    assert {*empty(to_json(RunConfig())), "validation.accelerate"} == {*PATH_KEYS, *names}


def test_the_compilation_cache_respects_jax_variables(monkeypatch):
  settings = {}
  monkeypatch.setattr("jax.config.update", lambda name, value: settings.update({name: value}))
  enable_compilation_cache()  # conftest.py has set both
  assert settings == {}
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  enable_compilation_cache()
  assert settings["jax_compilation_cache_dir"].endswith(".cache/univid_jax/programs")


class TestEnds:
  """Processes end by themselves, whatever threads are running."""

  def test_a_fault_while_training(self, tmp_path):
    """An internal error with a loader, an event writer and checkpoints open."""
    script = textwrap.dedent("""
      import sys
      from tests.helpers import compile_plain_step
      from univid_jax.checkpoints.run import Checkpointer
      from univid_jax.train import main
      from univid_jax.training import loop

      def save(*args, **kwargs):
        raise ValueError("injected fault")

      loop.compile_train_step = compile_plain_step
      Checkpointer.save = save
      sys.exit(main())
    """)
    arguments = [*SMALL, "--config.num_steps=3", "--config.validation.every_steps=0", f"--workdir={tmp_path / 'run'}"]
    process = start_python("-c", script, *arguments)
    done = finish(process)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: internal error (ValueError: injected fault)") and "Traceback" not in done.stderr
    (log,) = (tmp_path / "run" / "logs").iterdir()
    assert str(log) in line and 'raise ValueError("injected fault")' not in line and "in save" in log.read_text()

  @pytest.mark.long
  def test_processes_that_fail_together(self, tmp_path):
    """All exit with the code of the error at once."""
    port, started = free_port(), time.monotonic()
    arguments = [*SMALL, "--config.init_from=nowhere", f"--workdir={tmp_path}", "--num_processes=2"]
    processes = [
      start_command("univid_jax.train", *arguments, f"--coordinator=127.0.0.1:{port}", f"--process_id={i}")
      for i in range(2)
    ]
    for process in processes:
      done = finish(process)
      assert done.returncode == 1 and "error: " in done.stderr and "nowhere" in done.stderr, done.stderr
    assert time.monotonic() - started < 60

  @pytest.mark.slow
  def test_a_process_that_fails_alone_ends_the_others(self, tmp_path):
    """Within the time that a failing process waits for the others."""
    port, (data, empty) = free_port(), (tmp_path / "data", tmp_path / "empty")
    empty.mkdir()
    folders = {0: "", 1: empty}
    arguments = [*SMALL, "--config.num_steps=100000", f"--workdir={data}", "--num_processes=2"]
    processes = [
      start_command(
        "univid_jax.train",
        *arguments,
        f"--config.data.folder={folders[i]}",
        f"--coordinator=127.0.0.1:{port}",
        f"--process_id={i}",
      )
      for i in range(2)
    ]
    codes = [finish(process).returncode for process in processes]
    assert all(codes)


@pytest.mark.parametrize("cache, steps", [(None, 2), (StepCache(ratios=((1.0,) * 9,)), 9)], ids=["", "step_cache"])
def test_a_profile_of_sampling_has_named_annotations(tmp_path, cache, steps):
  """And as many steps as are asked for, unless a step cache has the ratios of another number."""
  import gzip

  import jax
  import numpy as np

  from univid_jax.cli.requests import RequestRunner
  from univid_jax.cli.sampling import Request, SamplingArguments
  from univid_jax.data.clips import ClipFormat
  from univid_jax.data.media.writer import write_clip
  from univid_jax.inference.pipeline import Pipeline
  from univid_jax.inference.plan import SamplingOptions

  class Stub(Pipeline):
    def __init__(self):
      pass

    def sample(self, clips, num_inference_steps, **others):
      jax.block_until_ready(jax.numpy.ones(3) + 1)
      assert num_inference_steps == steps

      class out:
        frames = clips[0]

      return out

  write_clip(tmp_path / "a.png", np.zeros((1, 16, 16, 3), np.uint8))
  request = Request((str(tmp_path / "a.png"),) * 3, tmp_path / "out.png")
  form = ClipFormat(size=(16, 16), num_frames=5)
  arguments = SamplingArguments(steps=SamplingOptions(num_inference_steps=9, step_cache=cache))
  line = RequestRunner(Stub(), form, arguments, {}).profile(request, 2)
  assert line == f"wrote a profile of {steps} steps: {tmp_path / 'profile'}"
  (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
  assert {"data", "step", "save"} <= names
