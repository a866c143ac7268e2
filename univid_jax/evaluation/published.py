"""Results of the UniVid paper (arXiv 2509.21760), as its tables print them."""

import dataclasses
from collections.abc import Iterable, Sequence

SOURCE = "UniVid, arXiv 2509.21760; measured on the authors' test sets, which are not public: not directly comparable."


@dataclasses.dataclass(frozen=True)
class PublishedResult:
  """A row of a table: a task, what was measured, and the values of the table's columns.

  Footnote numbers in parentheses refer to `FOOTNOTES`.
  """

  task: str
  metric: str
  values: tuple[str, str]


# Values of UniVid trained on each task separately, and on all tasks together.
TRAINING_COLUMNS = ("UniVid, separate", "UniVid, co-trained")
TRAINING = (
  PublishedResult("style", "CLIP-T", ("18.33", "24.01")),
  PublishedResult("camera", "GPT-4o, 0 to 10", ("6.33", "6.73")),
  PublishedResult("scribble", "RMSE", ("61.03 (1)", "51.94")),
  PublishedResult("depth", "RMSE", ("74.16", "2.55 (2)")),
  PublishedResult("segmentation", "RMSE", ("126.12", "123.03")),
  PublishedResult("salient object", "RMSE", ("33.35", "30.59")),
)

BENCHMARK_COLUMNS = ("LVM", "UniVid")
BENCHMARKS = (
  PublishedResult("style", "CLIP-T / CLIP-I", ("16.24 / .712", "19.76 / .670")),
  PublishedResult("edges (BIPED)", "ODS / OIS / AP", (".656 / .678 / .630", ".873 / .877 / .871")),
  PublishedResult("segmentation (ADE20K)", "mIoU / pixel accuracy", ("1.423 / 23.30", "8.712 / 53.13")),
  PublishedResult("depth (NYUv2)", "delta 1 / 2 / 3", (".15 / .31 / .48", ".43 / .76 / .91")),
  PublishedResult(
    "depth (NYUv2)", "AbsRel / SqRel / RMSElog / SILog", (".53 / .18 / 1.15 / 72.91", ".27 / .28 (3) / .42 / 30.74")
  ),
  PublishedResult(
    "normals (NYUv2)",
    "mean / median; below 5 / 11.25 / 30",
    ("30.76 / 13.73; 24.70 / 45.10 / 65.98", "29.84 / 13.52; 25.22 / 45.57 / 67.53"),
  ),
)

# Part of the names of tasks, or kinds of targets, that a row is about, by the row's first word.
_STEMS = {"edges": "edge", "normals": "normal", "salient": "salien"}


def select_results(results: Iterable[PublishedResult], names: Sequence[str]) -> list[PublishedResult]:
  """Returns the rows about tasks or kinds of targets with these names."""
  words = [(row, row.task.split()[0]) for row in results]
  return [row for row, word in words if any(_STEMS.get(word, word) in name.lower() for name in names)]


FOOTNOTES = (
  "(1) The paper reports the same number for depth. (2) 29 times lower than for the same task trained separately. "
  "(3) Worse than LVM, although all other depth metrics are better."
)
