"""Will it fit? python -m univid_jax.forecast --config=configs/video_tasks.py:wan_1_3b --topology=v5e:2x4 [--config.KEY=VALUE]

Compiles the training step for a TPU topology that need not be here (`pip install libtpu`) and prints what each chip has to hold.
"""

import os

from absl import flags
from ml_collections import config_flags

from univid_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", "configs/video_tasks.py", "Config file; :PRESET after it chooses a preset.")
SAMPLING = flags.DEFINE_bool("sampling", False, "Forecast sampling of one sentence of context I instead of training.")
TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU topology, as v5e:2x4 or v5p:2x2x2; the devices here by default.")

def main() -> None:
  # Before JAX looks for accelerators: this machine's own CPU does the compiling.
  if TOPOLOGY.value:
    os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    try:
      import libtpu
    except ModuleNotFoundError as error:
      raise cli.UserError("compiling for a TPU needs its compiler: pip install libtpu") from error
    os.environ["TPU_LIBRARY_PATH"] = os.path.join(os.path.dirname(libtpu.__file__), "libtpu.so")
  from jax.experimental import topologies

  from univid_jax import build
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training.forecast import ADVICE, forecast, forecast_sampling

  config = CONFIG.value
  build.check(config)
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value).devices if TOPOLOGY.value else None
  result = (forecast_sampling if SAMPLING.value else forecast)(config, make_mesh(config.mesh, devices))
  print(result)
  if not result.fits:
    raise cli.UserError(f"this does not fit; {ADVICE}")


if __name__ == "__main__":
  cli.run(main)
