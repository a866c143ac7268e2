"""Options that select behaviour, as enums: a misspelt name is an error where it is written."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from univid_jax.core.errors import UserError

# Seeds have 64 bits, see `core.seeds`. Runs also use the one after theirs; evaluations multiply theirs by a million.
MAX_SEED = 2**63 - 1
MAX_RUN_SEED = MAX_SEED - 1
MAX_EVAL_SEED = 10**12
# Maximum steps of a solver: Wan2.1's training has this many noise levels.
MAX_STEPS = 1000
# Maximum shift of noise levels; the largest in use is 12. A LoRA file with more is damaged; likewise frames per second.
MAX_SHIFT = 1000.0
MAX_FPS = 10_000.0
# Maximum scale of a LoRA: alpha / rank, or with rsLoRA alpha / sqrt(rank). Real ones are 0.01 to 100.
MAX_LORA_SCALE = 1e4


class Attention(enum.StrEnum):
  """What a token attends to."""

  FULL = "full"  # its whole sentence, as in UniVid
  CONTEXT_CAUSAL = "context_causal"  # context attends to context only, so that sampling computes it once


class ContextTimestep(enum.StrEnum):
  """The timestep of context tokens."""

  AUTO = "auto"  # what the base was trained with
  TARGET = "target"  # that of their sentence's target, as in UniVid
  ZERO = "zero"  # 0, as clean latents have in Wan2.2's TI2V


class AttentionBackend(enum.StrEnum):
  """The implementation of attention."""

  AUTO = "auto"  # the fastest that the platform, dtype and head size allow
  XLA = "xla"
  CUDNN = "cudnn"  # NVIDIA
  SPLASH = "splash"  # TPU


class ModelType(enum.StrEnum):
  """What a transformer is conditioned on, besides the prompt and the context; named as in Wan's config.json."""

  T2V = "t2v"  # nothing
  I2V = "i2v"  # the first frame: its latents and, in Wan2.1, its CLIP features
  TI2V = "ti2v"  # nothing; clean latents have timestep 0 beside noised ones


class Expert(enum.StrEnum):
  """Which half of the noise levels a transformer of Wan2.2 A14B was trained for."""

  HIGH = "high"
  LOW = "low"
  UNKNOWN = "unknown"  # one of them


class TrainedExpert(enum.StrEnum):
  """Which transformer of the base is trained."""

  ONLY = "only"  # the only one of its base
  HIGH = "high"  # the high-noise expert of Wan2.2 A14B
  LOW = "low"  # the low-noise expert
  BOTH = "both"  # one of the two in each step

  @property
  def parts(self) -> tuple["TrainedExpert", ...]:
    """The transformers that are trained."""
    return (TrainedExpert.HIGH, TrainedExpert.LOW) if self == TrainedExpert.BOTH else (self,)

  @property
  def experts(self) -> tuple[Expert, ...]:
    """The experts that are trained; empty for a base with one transformer."""
    return () if self == TrainedExpert.ONLY else tuple(map(Expert, self.parts))

  def split_tree(self, tree: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the subtree of each of `parts` from a tree that `join_trees` made."""
    return tuple(tree[part] for part in self.parts) if len(self.parts) > 1 else (tree,)

  def join_trees(self, trees: Sequence[Any]) -> Any:
    """Returns one tree from the trees of `parts`: keyed by name if there are several, else the only one."""
    return dict(zip(map(str, self.parts), trees, strict=True)) if len(self.parts) > 1 else trees[0]


class RematPolicy(enum.StrEnum):
  """Which parts of a block the backward pass recomputes."""

  NONE = "none"  # nothing
  DOTS = "dots"  # everything but attention and the products of Linears; adapters, too
  ATTENTION = "attention"  # everything but attention
  FULL = "full"  # everything
  OFFLOAD = "offload"  # everything; the input of each block is kept in host memory


class Quantize(enum.StrEnum):
  """How the linear weights of the blocks of a frozen base are stored."""

  NONE = "none"  # as floats; a base that was converted quantised stays so
  INT8 = "int8"  # 8 bits, a scale for every 64 inputs of an output
  FP8 = "fp8"  # float8_e4m3fn, a scale for every output
  NF4 = "nf4"  # 4 bits, QLoRA's NormalFloat, a scale for every 64 inputs of an output


class SolverName(enum.StrEnum):
  """A solver in `diffusion.solvers`."""

  EULER = "euler"  # UniVid's
  UNIPC = "unipc"  # as good in fewer steps
  DISTILLED = "distilled"  # the four steps of step-distilled models


class Resampling(enum.StrEnum):
  """How the pixels of a resized clip are computed."""

  BICUBIC = "bicubic"  # mixes the pixels around
  NEAREST = "nearest"  # takes the nearest one: depth, normals and labels must not be mixed
  MAX = "max"  # takes the brightest of those that fall into one: thin lines survive


class ClipFit(enum.StrEnum):
  """How a clip is brought to the model's size."""

  CROP = "crop"  # resize until the size is covered, cut out the centre
  PAD = "pad"  # resize until the clip fits, add black bars


class PromptStyle(enum.StrEnum):
  """Which of the paper's prompts a sentence carries."""

  NULL = "null"
  ROUGH = "rough"
  DETAILED = "detailed"


class TargetKind(enum.StrEnum):
  """What the pixels of a task's targets represent."""

  IMAGE = "image"
  DEPTH = "depth"
  NORMALS = "normals"
  SEGMENTATION = "segmentation"
  EDGES = "edges"
  SALIENCY = "saliency"
  CAMERA = "camera"  # a video of computed camera movement
  GRID = "grid"  # cells of ten colours


class Packing(enum.StrEnum):
  """Which open row a sentence goes to, and which batch a row goes to."""

  FIRST_FIT = "first_fit"  # the first one with room; rows are shuffled
  BEST_FIT = "best_fit"  # the fullest one with room; rows are shuffled
  BALANCED = "balanced"  # the fullest one with room; rows of similar work make a batch


class Objective(enum.StrEnum):
  """How training draws noise levels and weights their losses."""

  UNIVID = "univid"  # uniform over a grid of 1,000 levels, equal weights
  DIFFSYNTH = "diffsynth"  # the same grid, weighted by a bell over the timesteps
  LOGIT_NORMAL = "logit_normal"  # times from the logistic of a normal variable, as in Stable Diffusion 3
  RESOLUTION_SHIFT = "resolution_shift"  # shift times the square root of the number of target tokens


class OptimizerName(enum.StrEnum):
  ADAMW = "adamw"
  MUON = "muon"  # for the matrices of self-attention and feed-forward; NAdam for everything else, adapters included


class OnBadStep(enum.StrEnum):
  """What happens after a training step whose loss or gradient is not finite."""

  STOP = "stop"  # the run ends; its last checkpoint is from before
  SKIP = "skip"  # nothing is updated


class LearningRateSchedule(enum.StrEnum):
  """The learning rate after the warm-up."""

  CONSTANT = "constant"
  COSINE = "cosine"  # to 0
  LINEAR = "linear"  # constant, then to 0 over the last `decay_fraction` of the steps


class DepthAlignment(enum.StrEnum):
  """How predicted depth is brought to the scale of the ground truth before scoring."""

  LEAST_SQUARES = "least_squares"
  MEDIAN = "median"
  NONE = "none"


class OnDamaged(enum.StrEnum):
  """What to do if the newest checkpoint of a run is damaged."""

  FALLBACK = "fallback"  # use the newest that is intact, with a warning
  STOP = "stop"


OptionT = TypeVar("OptionT", bound=enum.StrEnum)


def parse_option(options: type[OptionT], name: str, value: str) -> OptionT:
  """Returns the option with a value; raises UserError that lists all options if there is none."""
  try:
    return options(value)
  except ValueError as error:
    raise UserError(f"{name} must be one of {', '.join(options)}, got {value!r}") from error
