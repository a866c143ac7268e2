"""Forecasts the memory that training, sampling or the autoencoder needs on each device.

  python -m univid_jax.forecast --config=PRESET [--config.KEY=VALUE ...] [--topology=v5e:2x4] [--of=sampling]

Compiles the program for the devices of this machine, or for a TPU topology that need not be here (`pip install
libtpu`). Weights need not be here. Exits with 1 if it does not fit.
"""

import logging
import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import describe_devices, use_tpu_compiler

log = logging.getLogger("univid_jax.forecast")  # also when run as __main__

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
TOPOLOGY = FLAGS.string("topology", None, "A TPU topology such as v5e:2x4 or v5p:2x2x2; default: the devices here.")
OF_HELP = (
  "What to forecast: training, sampling of one sentence of context I without encoders, or encoding or decoding of one "
  "clip by the autoencoder."
)
OF = FLAGS.choice("of", "training", ["training", "sampling", "encoding", "decoding"], OF_HELP)
SAMPLING = FLAGS.switch("sampling", False, "Deprecated: --of=sampling.")


@app.command(FLAGS)
def main() -> None:
  if TOPOLOGY.value:
    use_tpu_compiler()
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training import memory

  if SAMPLING.value:
    log.warning("--sampling is deprecated and will be removed: use --of=sampling")
  config, what = CONFIG.value, "sampling" if SAMPLING.value else OF.value
  mesh = make_mesh(config.mesh, describe_devices(TOPOLOGY.value) if TOPOLOGY.value else None)
  advice = memory.ADVICE
  if what == "training":
    result = memory.forecast(config, mesh)
  elif what == "sampling":
    result = memory.forecast_sampling(config, mesh)
  else:
    result, advice = memory.forecast_autoencoder(config, mesh, decoding=what == "decoding"), memory.TILING_ADVICE
  print(result)
  if not result.fits:
    raise UserError(f"this does not fit; {advice}")


if __name__ == "__main__":
  sys.exit(main())
