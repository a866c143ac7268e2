"""A model that a run has trained from scratch, as a checkpoint folder: a base to sample with and to train LoRAs on."""

import collections
import dataclasses
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

import univid_jax
from univid_jax.checkpoints import weights_file
from univid_jax.checkpoints.casting import cast
from univid_jax.checkpoints.checksums import combine_digests, tensor_digest, write_checksums
from univid_jax.checkpoints.info import CheckpointInfo, ComponentInfo
from univid_jax.checkpoints.run import RunRecord
from univid_jax.checkpoints.run_parts import transformer_config
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.tensor_files import numpy_dtype
from univid_jax.checkpoints.trained import restore_transformer, run_usage
from univid_jax.checkpoints.usage import SOFTWARE, SOFTWARE_NAME
from univid_jax.convert.destination import atomic_folder
from univid_jax.core.errors import UserError
from univid_jax.parallel.mesh import make_mesh


def require_from_scratch(workdir: epath.PathLike, record: RunRecord) -> None:
  """Raises UserError if a run has trained a base, of which a folder would lack the other parts."""
  if base := record.config.init_from:
    raise UserError(
      f"{workdir} is a run that trained the whole of {base}, whose other parts are not copied: use the workdir itself "
      "as the checkpoint"
    )


def write_trained_base(
  workdir: epath.PathLike,
  record: RunRecord,
  destination: epath.PathLike,
  *,
  step: int | str | None,
  dtype: str | None,
  force: bool,
) -> CheckpointInfo:
  """Writes the model of a run, with its codec and how it has to be run.

  Args:
    workdir: of the run.
    record: of the run.
    destination: the new folder, local or in a bucket.
    step: of its checkpoint; the latest by default.
    dtype: of the stored parameters; that of the run by default.
    force: whether to replace an existing destination.

  Raises:
    UserError: the run has a base, which is not copied; or its checkpoint is damaged.
    OSError: the destination exists, the disk is too small, or there is no checkpoint of this step.
  """
  config = record.config
  require_from_scratch(workdir, record)
  saved = SavedCheckpoints(workdir, model_only=True)
  _, params = restore_transformer(saved, config, make_mesh({"data": 1, "fsdp": -1}), step=step)
  stored = numpy_dtype(dtype or config.model.param_dtype)
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))
  arrays = {path: cast(".".join(path), np.asarray(value), stored) for path, value in flat.items()}
  digests = {(name := ".".join(path)): tensor_digest(name, value) for path, value in arrays.items()}
  size = sum(value.nbytes for value in arrays.values())
  component = ComponentInfo(
    config=dataclasses.asdict(transformer_config(config)),
    source=f"a run named {config.name}",
    layout=SOFTWARE_NAME,
    dtypes=dict(collections.Counter(str(value.dtype) for value in arrays.values())),
    num_tensors=len(arrays),
    num_parameters=sum(value.size for value in arrays.values()),
    num_files=0,
    checksum=combine_digests(digests),
  )
  info = CheckpointInfo(
    variant=config.name,
    version=univid_jax.__version__,
    components={"transformer": component},
    tokenizer=None,
    codec=dataclasses.asdict(config.codec),
    usage={SOFTWARE: f"{SOFTWARE_NAME} {univid_jax.__version__}", **run_usage(record).to_metadata()},
  )
  with atomic_folder(destination, needed=size, force=force) as folder:
    weights_file.save_arrays(folder / f"transformer{weights_file.SUFFIX}", traverse_util.unflatten_dict(arrays))
    info.write(folder)
    write_checksums(folder)
  return info
