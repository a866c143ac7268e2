"""Settings of a loader besides its sources: which rows are its own, and how it makes them."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from univid_jax.config.schema import RunConfig
from univid_jax.core.options import Packing
from univid_jax.parallel.sharding import own_rows, row_owners, rows_by_owner


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOwnership:
  """Which rows of a batch a process makes, and who makes the others.

  Attributes:
    own: ascending numbers of this process's rows.
    order: the order in which streams fill the rows of a batch, chosen so that few streams fill those of a process.
    num_owners: number of processes, or of groups that share rows, that make the rows of a batch.
    is_shared: whether other processes make the same rows. Processes that do, or that read the same stream, do not drop
      a sentence that another one may have read: it is read once more, and if that fails the error is raised.
  """

  own: Sequence[int]
  order: Sequence[int]
  num_owners: int = 1
  is_shared: bool = False

  @classmethod
  def whole(cls, num_rows: int) -> "RowOwnership":
    """Returns the ownership of a single process, which makes all rows."""
    return cls(own=range(num_rows), order=range(num_rows))

  @classmethod
  def from_mesh(cls, num_rows: int, mesh: Mesh, process: int | None = None) -> "RowOwnership":
    """Returns the ownership of a process, by default this one: the rows that its devices hold."""
    owners = set(row_owners(num_rows, mesh))
    return cls(
      own=own_rows(num_rows, mesh, process),
      order=rows_by_owner(num_rows, mesh),
      num_owners=len(owners),
      is_shared=any(len(each) > 1 for each in owners),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
  """How a loader reads sentences and packs rows.

  Attributes:
    num_threads: threads per stream that read and encode sentences.
    num_packing_bins: rows that are filled at the same time; by default two batches.
    packing: which of them a sentence goes to, and which batch a row goes to.
    num_streams: independent streams of rows, each with its share of the sentences; batches depend on their number.
    stream_processes: whether each stream is made in a separate process; sources and encoder must be picklable.
    allow_dropped: leave out sentences that cannot be used, and log each once, instead of stopping.
  """

  num_threads: int = 1
  num_packing_bins: int | None = None
  packing: Packing = Packing.FIRST_FIT
  num_streams: int = 1
  stream_processes: bool = False
  allow_dropped: bool = False

  @classmethod
  def from_config(cls, config: RunConfig, ownership: RowOwnership) -> "LoaderOptions":
    """Returns a run's options; without a configured number of streams, each owner of rows has one, if they divide."""
    return cls(
      num_threads=config.data.num_threads,
      num_packing_bins=config.rows.packing_bins,
      packing=config.rows.packing,
      num_streams=config.rows.streams or math.gcd(len(ownership.order), ownership.num_owners),
      stream_processes=config.data.stream_processes,
      allow_dropped=config.data.allow_dropped,
    )
