"""The adviser of `univid-forecast --chip`: what it compiles, in which order, and that its commands are what it says."""

import dataclasses
import shlex

import jax
import pytest

from univid_jax import forecast as command
from univid_jax.checkpoints.run_parts import transformer_config
from univid_jax.checkpoints.sentence_lengths import longest_sentence
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny, wan22_a14b, wan22_ti2v_5b, wan_1_3b, wan_14b
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize, RematPolicy
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning import estimates
from univid_jax.planning.advice import Machine, advise, describe, make_options, order, smaller_rows
from univid_jax.planning.estimates import GPU_MARGIN, GPU_PEAK, ModelBytes, estimate
from univid_jax.planning.forecasts import forecast
from univid_jax.platform.chips import NAMES
from univid_jax.training.memory import DoesNotFitError, Forecast

ONE = {"data": 1, "fsdp": 1, "context": 1}
FIVE_B = {"data.height": 480, "data.width": 832, "rows.num_tokens": 8192}
OFFLOADED_14B = {"base.quantize": "int8", "base.offload": True, "model.remat": "offload", "rows.num_tokens": 31744}


def fake_compiler(gigabytes, seen=None):
  """Returns a compiler by whose figures a config needs what a function of it says, or refuses it where that is None."""

  def compile_config(config):
    if seen is not None:
      seen.append(config)
    size = gigabytes(config)
    if size is None:
      raise DoesNotFitError("RESOURCE_EXHAUSTED: HLO temporaries (39.83G) exceeds available HBM (31.25G)", "take more")
    return Forecast(weights=int(size * 1e9), batch=0, activations=0, device="TPU v6 lite", memory=int(33.5e9))

  return compile_config


class TestOrder:
  def test_fastest_first_and_compiled_until_enough_fit(self):
    machine, seen = Machine(name="v6e"), []
    options = advise(wan_1_3b(), machine, fake_compiler(lambda config: 20, seen), count=2)
    assert [option.config for option in options if not option.problem] == seen
    assert [(config.base.quantize, config.model.remat) for config in seen] == [
      (Quantize.NONE, RematPolicy.ATTENTION),
      (Quantize.NONE, RematPolicy.FULL),
    ]
    pruned = [option for option in options if option.problem]
    assert {option.config.model.remat for option in pruned} == {RematPolicy.NONE, RematPolicy.DOTS}
    assert all(option.problem.startswith("needs at least") and option.memory > machine.memory for option in pruned)

  def test_a_quantised_base_only_where_memory_is_tight(self):
    seen = []
    advise(wan_1_3b(), Machine(name="v6e"), fake_compiler(lambda config: 32, seen), count=2)
    assert [config.base.quantize for config in seen] == [Quantize.NONE, Quantize.INT8]

  def test_the_base_stays_exact_where_that_is_about_as_fast(self):
    """On slow links a smaller base is a little faster, which is no reason to quantise it."""
    fitting = [option for option in advise(wan_14b(), Machine(name="rtx4090", count=8), None) if not option.problem]
    first, mesh = fitting[0], {"data": 1, "fsdp": 1, "context": 8}
    assert (first.config.base.quantize, first.config.model.remat) == (Quantize.NONE, RematPolicy.ATTENTION)
    assert first.mesh == mesh and not any(option.mesh == mesh for option in fitting[1:])

  @pytest.mark.parametrize("gain, expected", [(1.05, ["none", "nf4"]), (1.3, ["nf4", "none"])])
  def test_a_quantised_base_comes_first_where_it_is_much_faster(self, gain, expected):
    options = {
      str(option.config.base.quantize): option
      for option in make_options(override(wan_14b(), {"model.remat": "full"}), Machine(name="h100"), {})
      if option.config.model.remat == RematPolicy.FULL
    }
    slow = options["none"].estimate
    fast = dataclasses.replace(slow, compute=slow.compute / gain, memory=slow.memory / gain)
    options = dataclasses.replace(options["nf4"], estimate=fast), options["none"]
    assert [str(option.config.base.quantize) for option in order(options)] == expected

  def test_a_gpu_that_is_here_decides(self):
    """Its compiler is asked about what the estimate leaves out only with its margins."""
    config, machine, seen = wan_1_3b(), Machine(name="l4"), []
    advise(config, machine, fake_compiler(lambda config: 20, seen), count=1)
    assert seen[0].model.remat == RematPolicy.ATTENTION
    expected = estimate(seen[0], machine.chip, ONE, is_tpu=False)
    assert expected.least < machine.memory < expected.total
    options = advise(config, machine, fake_compiler(lambda config: 20), count=1)
    assert all(option.problem.startswith("needs at least") for option in options if option.problem)

  def test_refusals_are_reasons(self):
    def size(config):
      return None if config.model.remat == RematPolicy.ATTENTION else 20

    options = advise(wan_1_3b(), Machine(name="v6e"), fake_compiler(size), count=1)
    refused = [option for option in options if option.config.model.remat == RematPolicy.ATTENTION]
    assert [option.problem for option in refused] == ["needs 42.8 GB besides its inputs"] * 3
    text = describe(options, Machine(name="v6e"), ["--config=wan_1_3b"], is_compiled=True)
    assert "20.0 of 33.5 GB" in text and "42.8 GB besides" in text and "the compiler's for v6e" in text
    assert "step of 1 row in about " in text and "as if nothing overlapped" in text and "lower bound" not in text

  def test_what_fits_with_the_memory_of_the_host(self):
    def size(config):
      return 25 if config.base.offload else 40

    options = advise(wan_14b(), Machine(name="v6e"), fake_compiler(size), count=2)
    fitting = [option for option in options if not option.problem]
    assert [(option.config.base.quantize, option.config.model.remat) for option in fitting] == [
      (Quantize.NONE, RematPolicy.OFFLOAD)
    ]
    assert fitting[0].config.rows.num_tokens == 37504
    assert "--config.base.offload=True" in fitting[0].command(["--config=wan_14b"])
    assert "base not quantised, offloaded, remat offload" in str(fitting[0])
    assert "host's copies, assumed to take 16 GB/s" in describe(options, Machine(name="v6e"), [], is_compiled=True)

  def test_smaller_rows_only_if_nothing_else_fits(self):
    def size(config):
      return 20 if config.rows.num_tokens < 20000 else 40

    options = advise(wan_14b(), Machine(name="v6e"), fake_compiler(size))
    fitting = [option for option in options if not option.problem]
    assert {(option.config.data.num_frames, option.config.rows.num_tokens) for option in fitting} == {(9, 19456)}
    tokens = [option.config.rows.num_tokens for option in options]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 37504

  def test_nothing_fits(self):
    with pytest.raises(UserError, match=r"nothing fits 1 t4: the smallest, base in nf4.*clips of 1 frame, needs .* GB"):
      advise(wan_14b(), Machine(name="t4"), None)


class TestOptions:
  def test_smaller_clips_are_those_of_the_codec(self):
    levels = list(smaller_rows(wan22_ti2v_5b(), Machine(name="h100")))
    assert levels[:2] == [{}, {"data.num_frames": 13, "rows.num_tokens": 14080}]
    small = next(level for level in levels if "data.height" in level)
    assert small["rows.num_tokens"] == 7808 and "data.num_frames" not in small
    assert override(wan22_ti2v_5b(), small).data.sizes == ((480, 832),)

  def test_meshes_divide_rows_and_devices(self):
    config = override(wan_14b(), {"rows.per_batch": 4, "base.quantize": "int8"})  # one way to store the base
    options = list(make_options(config, Machine(name="v5e", count=16), {}))
    meshes = {tuple(option.mesh.values()) for option in options}
    assert (1, 4, 4) in meshes and (16, 1, 1) not in meshes
    assert all(a * b * c == 16 for a, b, c in meshes)
    assert all(option.estimate.rows == 4 for option in options)

  def test_streams_divide_rows(self):
    config = override(wan_1_3b(), {"rows.streams": 4, "base.quantize": "int8"})
    rows = {option.estimate.rows for option in make_options(config, Machine(name="h100", count=8), {})}
    assert rows == {4, 8}

  def test_rows_hold_the_longest_sentence(self):
    """Of the numbers of clips and contexts that are drawn."""
    longer = override(wan_14b(), {"data.num_clips.clips_8": 1.0, "rows.num_tokens": 65536})
    for config in (longer, override(longer, {"data.max_video_clips": 6})):
      levels = list(smaller_rows(config, Machine(name="h100")))
      assert len(levels) > 2
      for level in levels[1:]:
        changed = override(config, level)
        tokens, _, count = longest_sentence(changed)
        assert tokens <= changed.rows.num_tokens < tokens + 128
        assert count == (config.data.max_video_clips or 8) or changed.data.num_frames == 1
      assert next(make_options(config, Machine(name="h100", count=8), levels[-1])).config.data.num_frames == 1

  def test_a_trained_base_is_not_quantised(self):
    options = list(make_options(tiny(), Machine(name="t4"), {}))
    assert {option.config.base.quantize for option in options} == {Quantize.NONE}

  def test_a_chosen_storage_stays(self):
    config = override(wan_14b(), {"base.quantize": "fp8"})
    assert {option.config.base.quantize for option in make_options(config, Machine(name="h100"), {})} == {Quantize.FP8}

  def test_t4_has_no_bfloat16(self):
    options = list(make_options(wan_1_3b(), Machine(name="t4"), {}))
    assert {option.config.model.dtype for option in options} == {"float32"}

  def test_what_was_not_measured_on_a_gpu_counts_twice(self):
    config = override(wan_1_3b(), {"model.remat": "none"})
    gpu, tpu = (estimate(config, Machine(name="h200").chip, ONE, is_tpu=is_tpu) for is_tpu in (False, True))
    assert gpu.least == tpu.least == tpu.total and gpu.margin > gpu.stored

  def test_masks_of_packed_rows_count_on_a_gpu(self):
    """A mask for all pairs of cuDNN's, the same as a bias, and the gradient of that; of plain XLA logits."""

    def attention(changes, mesh=ONE):
      return estimate(override(wan_1_3b(), changes), Machine(name="h200").chip, mesh, is_tpu=False).attention

    pairs = 37504**2
    assert attention({}) == attention({"mesh.context": 4}, ONE | {"context": 4}) == 5 * pairs
    assert attention({"rows.per_batch": 2, "rows.num_tokens": 31200}) == 10 * 31200**2
    assert attention({"rows.per_batch": 2, "rows.microbatches": 2}) == 5 * pairs
    assert attention({"mesh.context": 24}, ONE | {"context": 24}) == 5 * pairs / 2  # in two rings of 12 heads
    logits = 4 * 12 * 12 * 1024 * 37504
    assert attention({"model.attention_backend": "xla"}) == attention({"model.dtype": "float32"}) == logits
    assert attention({"rows.per_batch": 2}) == logits  # above `cudnn.MAX_MASK`
    assert attention({"rows.num_tokens": 48000}) == 12 * 2**31
    assert estimate(wan_1_3b(), Machine(name="v6e").chip, ONE, is_tpu=True).attention == 0

  @pytest.mark.parametrize(
    "make, name, changes, mesh, gigabytes",
    [
      (wan_1_3b, "v5e", {"base.offload": True, "model.remat": "offload", "rows.num_tokens": 31744}, (1, 1), 4.74),
      (wan_1_3b, "v5e", {"rows.num_tokens": 31744}, (1, 1), 13.49),
      (wan_1_3b, "v5e", {"rows.num_tokens": 31744, "base.quantize": "int8"}, (1, 1), 12.10),
      (wan_1_3b, "v5e", {"base.quantize": "int8"}, (1, 1), 14.21),
      (wan_1_3b, "v5e", {}, (1, 1), 15.3),
      (wan22_ti2v_5b, "v5e", FIVE_B | {"base.quantize": "int8"}, (1, 1), 12.02),
      (wan_14b, "v6e", OFFLOADED_14B, (1, 1), 17.35),
      (wan_14b, "v5e", {"base.quantize": "nf4", "rows.num_tokens": 31744}, (1, 4), 15.58),
      (wan_14b, "v5e", {"base.quantize": "int8"}, (1, 8), 11.63),
      (wan_14b, "v5e", {}, (1, 8), 13.2),
      (wan_14b, "v5e", {}, (4, 4), 16.3),
      (wan_14b, "v5p", {}, (1, 1), 79.3),
    ],
  )
  def test_what_is_pruned_does_not_fit(self, make, name, changes, mesh, gigabytes):
    """The estimate is below what docs/benchmarks/tpu.md has from the TPU compiler, but not by half."""
    mesh = {"data": 1, "fsdp": mesh[0], "context": mesh[1]}
    config = override(make(), changes | {f"mesh.{axis}": size for axis, size in mesh.items()})
    found = estimate(config, Machine(name=name).chip, mesh, is_tpu=True)
    assert 0.6 * gigabytes < found.total / 1e9 < gigabytes

  def test_a_block_copied_from_the_host_counts(self):
    def block(changes):
      return estimate(override(wan_14b(), changes), Machine(name="v6e").chip, ONE, is_tpu=True).block

    assert 0.68e9 < block({"base.offload": True}) - block({}) < 0.72e9

  @pytest.mark.parametrize(
    "name, ema_decay, param_dtype, expected",
    [
      ("adamw", 0.0, "float32", 4 + 4 * 2 + 4),
      ("muon", 0.0, "float32", 4 + 4 * 1 + 4),
      ("adamw", 0.9, "float32", 4 + 4 * 2 + 4 + 4),
      ("adamw", 0.0, "bfloat16", 2 + 4 * 2 + 2),
      ("muon", 0.9, "bfloat16", 2 + 4 * 1 + 4 + 2),
    ],
  )
  def test_bytes_of_a_parameter(self, name, ema_decay, param_dtype, expected):
    """Itself, two moments of AdamW's and one of Muon's, its average, and its gradient."""
    changes = {"optimizer.name": name, "ema_decay": ema_decay, "model.param_dtype": param_dtype}
    size = 1000 * jax.numpy.dtype(param_dtype).itemsize
    sizes = ModelBytes(base=size, blocks=size, adapters=0, block=0.0, stored_block=0.0)
    assert estimates._state_bytes(override(tiny(), changes), sizes) == 1000 * expected

  def test_a_quarter_of_a_sentence_of_four_clips_are_targets(self, monkeypatch):
    counts = []
    monkeypatch.setattr(estimates, "step_flops", lambda *_, **given: counts.append(given) or 0)
    estimates.step_operations(wan_1_3b())
    assert all(each["targets"] * 4 == each["tokens"] == 31200 + 6240 for each in counts) and counts

  def test_offloaded_blocks_come_for_the_forward_and_for_the_backward_pass(self, monkeypatch):
    """Those of a device; at a byte per second, all that the device computes meanwhile is that much less to wait for."""
    monkeypatch.setattr(estimates, "HOST_BANDWIDTH", 1.0)
    sizes = ModelBytes(base=10**9, blocks=8 * 10**8, adapters=10**6, block=1e6, stored_block=1e6)
    mesh, chip = {"data": 1, "fsdp": 2, "context": 1}, Machine(name="v5e").chip
    (compute, offloaded, _), (_, resident, _) = (
      estimates._seconds(config, transformer_config(config), sizes, chip, mesh, rows=2, is_tpu=True)
      for config in (override(wan_14b(), {"base.offload": offload, "model.remat": "full"}) for offload in (True, False))
    )
    assert offloaded - resident == pytest.approx(2 * 8 * 10**8 / 2 - compute, rel=1e-9)

  def test_a_gpu_attends_to_all_of_a_row(self):
    """cuDNN and plain XLA skip no other sentences; the TPU's kernel does."""
    gpu, tpu = (estimate(wan_14b(), Machine(name="h200").chip, ONE, is_tpu=is_tpu) for is_tpu in (False, True))
    pairs = 37504**2 - 31200**2 - 6240**2
    assert gpu.compute - tpu.compute == pytest.approx(4 * 39.25 * 4 * pairs * 5120 / 989e12, rel=1e-9)

  def test_both_experts_count(self):
    one, both = (
      estimate(override(wan22_a14b(), {"model.expert": expert}), Machine(name="h200").chip, ONE, is_tpu=False)
      for expert in ("high", "both")
    )
    assert 28e9 < both.weights - one.weights < 31e9

  @pytest.mark.parametrize("name", NAMES)
  def test_every_chip_has_figures(self, name):
    assert Machine(name=name).memory > 1e10 and Machine(name=name).is_tpu == name.startswith("v")


@pytest.mark.parametrize("remat, gib", [("full", 6.23), ("attention", 7.75)])
def test_estimate_of_a_gpu_agrees_with_what_was_measured(remat, gib):
  """On an H100: 8 blocks of the 1.3B's width, 31,200 tokens without a mask; see docs/benchmarks/gpu.md."""
  shape = {"variant": "", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 8, "freq_dim": 256}
  changes = {f"model.{key}": value for key, value in shape.items()} | {"model.text_dim": 4096, "model.remat": remat}
  config = override(wan_1_3b(), {**changes, "rows.num_tokens": 31200})
  found = estimate(config, Machine(name="h100").chip, ONE, is_tpu=False)
  without_mask, measured = found.total - found.attention, gib * 2**30
  assert without_mask - GPU_MARGIN * GPU_PEAK * 31200 * 1536 * 2 == pytest.approx(measured, rel=0.04)
  assert found.least < measured < without_mask


def parse(line):
  """Returns the config of a command that the adviser prints."""
  words = shlex.split(line)
  flags = CommandFlags("")
  config = flags.config()
  flags.parse(words[words.index("univid-train") :])
  return config.value


class TestCommands:
  @pytest.mark.parametrize(
    "make, machine",
    [
      (wan_1_3b, Machine(name="h100")),
      (wan_14b, Machine(name="rtx4090")),
      (wan_14b, Machine(name="a100-40", count=8)),
      (wan22_ti2v_5b, Machine(name="t4")),
      (wan22_a14b, Machine(name="h200", count=2)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
  )
  def test_are_what_was_estimated(self, make, machine):
    options = advise(make(), machine, None)
    text = describe(options, machine, [f"--config={make.__name__}"], is_compiled=False)
    commands = [line for line in text.splitlines() if "univid-train" in line]
    fitting = [option for option in options if not option.problem]
    assert len(commands) == len(fitting) > 0 and f"{GPU_MARGIN:.0%} on top" in text
    for line, option in zip(commands, fitting, strict=True):
      assert parse(line) == option.config and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in line
      again = estimate(option.config, machine.chip, option.mesh, is_tpu=False)
      assert again.total == option.memory <= machine.memory

  @pytest.mark.parametrize("make", [wan_1_3b, wan22_ti2v_5b], ids=lambda make: make.__name__)
  def test_of_smaller_rows_are_accepted(self, make):
    machine = Machine(name="t4")
    for level in smaller_rows(make(), machine):
      option = next(make_options(make(), machine, level))
      assert parse(option.command([f"--config={make.__name__}"])) == option.config

  def test_agree_with_the_forecast(self):
    """Compiled here, for the CPU: once, because the command has the same config."""
    small = "model.num_layers=1 model.dim=32 rows.per_batch=1 optimizer.name=adamw ema_decay=0.0"
    given = ["--config=tiny", *(f"--config.{change}" for change in small.split())]
    found = []

    def compile_config(config):
      found.append(forecast(config, make_mesh(config.mesh, jax.devices()[:1])))
      return found[-1]

    options = advise(parse(shlex.join(["univid-train", *given])), Machine(name="t4"), compile_config, count=1)
    assert len(options) == len(found) == 1 and not options[0].problem
    assert options[0].memory == found[0].total and parse(options[0].command(given)) == options[0].config

  def test_replace_what_was_given(self):
    option = next(iter(make_options(wan_1_3b(), Machine(name="h100"), {})))
    option = dataclasses.replace(option, changes={"model.remat": "dots"})
    given = ["--config=wan_1_3b", "--config.model.remat=full", "--config.data.folder=my videos"]
    assert (
      option.command(given)
      == "univid-train --config=wan_1_3b '--config.data.folder=my videos' --config.model.remat=dots"
    )

  def test_run(self, capfd):
    arguments = ["--config", "wan_1_3b", "--config.lora.rank", "8", "--chip=h100"]
    assert command.main(["forecast", *arguments]) == 0
    out, _ = capfd.readouterr()
    assert "--config=wan_1_3b --config.lora.rank=8 --config.model.remat=attention" in out
    assert "--config.init_from=CONVERTED --config.data.pairs=DATA" in out, "Wan learns from pairs"
    assert "base not quantised, remat" in out and "mesh data 1 x fsdp 1 x context 1, rows of" in out

  @pytest.mark.parametrize(
    "arguments, code, message",
    [
      (
        ["--chip=v9"],
        2,
        "--chip=v9 is not known; there are v5e, v6e, v5p, t4, l4, rtx4090, a100-40, a100-80, h100, h200. For another",
      ),
      (["--chip=H100", "--config.data.height=470"], 1, "470"),
      (["--chip=v6e", "--chips=3"], 1, "no slice of 3 v6e; the nearest have 1 (v6e:1x1) and 4 (v6e:2x2)"),
      (["--chip=h100", "--chips=0"], 2, "chips"),
      (["--chip=h100", "--topology=v5e:2x2"], 2, "leave out --topology"),
      (["--sampling", "--of=decoding"], 2, "--sampling is --of=sampling, and contradicts --of=decoding"),
      (["--chips=4"], 2, "--chips is a number of --chip"),
      (["--chip=h100", "--of=decoding"], 2, "leave out --topology, --of"),
      (["--chip=h100", "--config.rows.num_tokens=30000"], 1, "a sentence of 4 clips of context I has 31200 tokens"),
      (["--chip=h100", "--config.data.height=470"], 1, "470"),
    ],
  )
  def test_mistakes_are_one_line(self, arguments, code, message, capfd):
    assert command.main(["forecast", "--config=wan_1_3b", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
