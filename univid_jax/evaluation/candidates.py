"""What an evaluation compares with the ground truth, under the names in its reports."""

import enum


class Candidate(enum.StrEnum):
  """A variant of sampling or a baseline; variants with other numbers of steps or other noise have further names.

  Attributes:
    label: label of its column.
    description: its explanation in report.md.
  """

  label: str
  description: str

  def __new__(cls, name: str, label: str, description: str) -> "Candidate":
    member = str.__new__(cls, name)
    member._value_, member.label, member.description = name, label, description
    return member

  PREDICTION = "prediction", "prediction", "the model's prediction"
  SWAPPED = "swapped", "wrong examples", "the model, shown example pairs of another task: does it read them?"
  INVERSE = "inverse", "inverse task", "the model, shown the inverse task: A', A instead of A, A'"
  ACCELERATED = "accelerated", "accelerated", "the model with a distillation LoRA, sampled in few steps"
  COPY_B = "copy_b", "copy of B", "a copy of B"
  COPY_A2 = "copy_a2", "copy of A'", "a copy of A'"
  MEAN_A2 = "mean_a2", "mean of A'", "the mean colour of A'"
  CODEC = "codec", "codec", "the ground truth, encoded and decoded: the upper bound"
  MOST_FREQUENT = "most_frequent", "most frequent answer", "the one answer that is right most often"
