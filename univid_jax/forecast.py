"""Forecasts the memory that training or sampling needs on each device.

  python -m univid_jax.forecast --config=PRESET [--config.KEY=VALUE ...] [--topology=v5e:2x4] [--sampling]

Compiles the program for the devices of this machine, or for a TPU topology that need not be here (`pip install
libtpu`). Exits with 1 if it does not fit.
"""

import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import describe_devices, use_tpu_compiler

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
TOPOLOGY = FLAGS.string("topology", None, "A TPU topology such as v5e:2x4 or v5p:2x2x2; default: the devices here.")
SAMPLING = FLAGS.switch("sampling", False, "Forecast sampling of one sentence of context I instead of training.")


@app.command(FLAGS)
def main() -> None:
  if TOPOLOGY.value:
    use_tpu_compiler()
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training.memory import ADVICE, forecast, forecast_sampling

  devices = describe_devices(TOPOLOGY.value) if TOPOLOGY.value else None
  mesh = make_mesh(CONFIG.value.mesh, devices)
  result = forecast_sampling(CONFIG.value, mesh) if SAMPLING.value else forecast(CONFIG.value, mesh)
  print(result)
  if not result.fits:
    raise UserError(f"this does not fit; {ADVICE}")


if __name__ == "__main__":
  sys.exit(main())
