"""Forecasts the memory that training, sampling or an encoder needs on each device, or advises how to train.

  python -m univid_jax.forecast --config=PRESET [--config.KEY=VALUE ...] [--topology=v5e:2x4] [--of=sampling]
  python -m univid_jax.forecast --config=PRESET [--config.KEY=VALUE ...] --chip=v6e [--chips=4]

Compiles the program for the devices of this machine, or for a TPU topology that need not be here (extra
`tpu`). Weights need not be here. Exits with 1 if it does not fit.

With --chip it lists combinations of the base's storage, recomputation and mesh that fit, fastest first, each as a
command. Only if none fits at the config's size does it try smaller rows and clips. For TPUs it compiles until three
fit, minutes each; for GPUs too if they are here, and otherwise it estimates.
"""

import logging
import os
import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.errors import UserError
from univid_jax.platform.chips import GPU_SHARE, NAMES, is_tpu
from univid_jax.platform.topologies import describe_devices, find_topology, use_tpu_compiler

log = logging.getLogger("univid_jax.forecast")  # also when run as __main__

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
TOPOLOGY = FLAGS.string("topology", None, "A TPU topology such as v5e:2x4 or v5p:2x2x2; default: the devices here.")
OF_HELP = (
  "What to forecast: training, sampling of one sentence of context I without encoders, encoding or decoding one clip "
  "by the autoencoder, or prompts: embedding one by the text encoder."
)
OF = FLAGS.choice("of", "training", ["training", "sampling", "encoding", "decoding", "prompts"], OF_HELP)
SAMPLING = FLAGS.switch("sampling", False, "Deprecated: --of=sampling.")
CHIP = FLAGS.string("chip", None, f"Advise how to train on this kind of chip: {', '.join(NAMES)}.")
CHIPS = FLAGS.integer("chips", 1, "Number of these chips.", lower_bound=1)


@app.command(FLAGS)
def main() -> None:
  if SAMPLING.value and FLAGS.given(["of"]) and OF.value != "sampling":
    raise UsageError(f"--sampling is --of=sampling, and contradicts --of={OF.value}: leave one of them out")
  if SAMPLING.value:
    log.warning("--sampling is deprecated and will be removed: use --of=sampling")
  what = "sampling" if SAMPLING.value else OF.value
  if CHIP.value:
    if TOPOLOGY.value or what != "training":
      raise UsageError("--chip advises how to train: leave out --topology, --of and --sampling")
    advise(parse_chip(CHIP.value))
  elif FLAGS.given(["chips"]):
    raise UsageError("--chips is a number of --chip: say which")
  else:
    forecast(what)


def parse_chip(text: str) -> str:
  """Returns the name of a chip, whatever its case.

  Raises:
    UsageError: there is none of this name.
  """
  if (chip := text.lower()) not in NAMES:
    raise UsageError(
      f"--chip={text} is not known; there are {', '.join(NAMES)}. For another chip take one with as "
      "much memory or a little less, or forecast on it, without --chip"
    )
  return chip


def advise(chip: str) -> None:
  """Prints how the config can be trained on --chips of a kind of chip."""
  if is_tpu(chip):
    find_topology(chip, CHIPS.value)  # before JAX is imported
    use_tpu_compiler()
  else:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))  # as in the commands
  from univid_jax.planning import advice

  config, machine = CONFIG.value, advice.Machine(name=chip, count=CHIPS.value)
  compile_config = advice.find_compiler(machine)
  options = advice.advise(config, machine, compile_config, progress=log.info)
  print(advice.describe(options, machine, FLAGS.config_arguments, is_compiled=compile_config is not None))
  if config.model.variant and not config.init_from:
    print("add your base and data: --config.init_from=CONVERTED --config.data.pairs=DATA")


def forecast(what: str) -> None:
  """Prints the memory of a program; raises UserError if it does not fit."""
  if TOPOLOGY.value:
    use_tpu_compiler()
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.planning import forecasts
  from univid_jax.training.memory import ADVICE

  config = CONFIG.value
  mesh = make_mesh(config.mesh, describe_devices(TOPOLOGY.value) if TOPOLOGY.value else None)
  advice = ADVICE
  if what == "training":
    result = forecasts.forecast(config, mesh)
  elif what == "sampling":
    result = forecasts.forecast_sampling(config, mesh)
  elif what == "prompts":
    result = forecasts.forecast_text_encoder(config, mesh)
  else:
    result, advice = forecasts.forecast_autoencoder(config, mesh, decoding=what == "decoding"), forecasts.TILING_ADVICE
  print(result)
  if not result.fits:
    raise UserError(f"this does not fit; {advice}")


if __name__ == "__main__":
  sys.exit(main())
