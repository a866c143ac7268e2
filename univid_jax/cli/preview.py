"""A picture of the data, as the model sees it."""

from etils import epath

from univid_jax.core.paths import atomic_write
from univid_jax.data.pictures import contact_sheet
from univid_jax.data.sources.open import DataSources


def draw_preview(data: DataSources, count: int, workdir: str) -> epath.Path:
  """Draws the first `count` sentences of every source to WORKDIR/preview.png; returns the path."""
  path = epath.Path(workdir) / "preview.png"
  sentences = [(name, source[index]) for index in range(count) for name, source in data.sources.items()]
  with atomic_write(path) as unfinished:
    contact_sheet(unfinished, sentences)
  return path
