"""The prompts of the UniVid paper."""

from univid_jax.core.options import PromptStyle

ROUGH_PROMPT = (
  "[clip1] and [clip2] form an editing pair. Apply the same transformation observed from [clip1] to [clip2] "
  "to [clip3], and generate [clip4]."
)
CAMERA_PROMPT = (
  "[clip1] is the original source video, and [clip2] is the same clip with camera motion applied. [clip3] is a "
  "different source video. For [clip4], apply the exact same camera movement transformation from [clip1] to "
  "[clip2] on [clip3]."
)
DETAILED_PROMPT = (
  "[clip1] is the original source video, and [clip2] is its corresponding {name}. [clip3] is another, "
  "different source video. In [clip4], the {name} transformation applied from [clip1] to [clip2] is similarly "
  "applied to [clip3]."
)


# What the paper calls the targets of tasks that are not computed.
PAPER_TARGETS = ("segmentation map", "depth map", "edge map", "normal map")


def prompt_for(task_name: str, style: PromptStyle) -> str:
  """Returns the paper's prompt for a task.

  Args:
    task_name: "camera movement", or what the target is called, for example "scribble map".
    style: of the prompt.
  """
  if style == PromptStyle.NULL:
    return ""
  if style == PromptStyle.ROUGH:
    return ROUGH_PROMPT
  return CAMERA_PROMPT if task_name == "camera movement" else DETAILED_PROMPT.format(name=task_name)
