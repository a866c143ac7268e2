"""CLIP-T and CLIP-I, with PyTorch and transformers (the extra `clip`)."""

from typing import Any

import numpy as np

from univid_jax.core.errors import UserError, first_line
from univid_jax.core.installation import install_command


class CLIPScores:
  """Similarities in the embedding space of CLIP (Radford et al. 2021).

  Args:
    path: a CLIP model in the format of transformers, a folder or a name on the Hugging Face hub.

  Raises:
    UserError: the extra is not installed, there is no such model, or the hub does not answer.
  """

  def __init__(self, path: str):
    try:
      import transformers
    except ModuleNotFoundError as error:
      raise UserError(f"CLIP scores need PyTorch and transformers: {install_command('clip')}") from error
    try:
      self._model = transformers.CLIPModel.from_pretrained(path).eval()
      self._processor: Any = transformers.CLIPProcessor.from_pretrained(path)  # its stubs lack `images` and `padding`
    except (OSError, ValueError) as error:
      raise UserError(f"transformers cannot load {path} as a CLIP model: {first_line(error)}") from error
    self._texts: dict[str, np.ndarray] = {}

  def clip_t(self, clip: np.ndarray, text: str) -> float:
    """Returns 100 times the mean cosine between the frames, uint8 (T, H, W, 3), and a text; higher is better."""
    return 100 * float(np.mean(self._embed_frames(clip) @ self._embed_text(text)))

  def clip_i(self, clip: np.ndarray, other: np.ndarray) -> float:
    """Returns the cosine between the mean embeddings of two clips; 1 is best."""
    a, b = (self._embed_frames(x).mean(axis=0) for x in (clip, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

  def _embed_frames(self, clip: np.ndarray) -> np.ndarray:
    return _normalise(self._model.get_image_features(**self._processor(images=list(clip), return_tensors="pt")))

  def _embed_text(self, text: str) -> np.ndarray:
    if text not in self._texts:  # there are few prompts, each with many clips
      inputs = self._processor(text=[text], return_tensors="pt", padding=True, truncation=True)
      self._texts[text] = _normalise(self._model.get_text_features(**inputs))[0]
    return self._texts[text]


def _normalise(features: Any) -> np.ndarray:
  """Converts PyTorch features to unit vectors; newer versions of transformers wrap them in an output object."""
  features = getattr(features, "pooler_output", features).detach().numpy()
  return features / np.linalg.norm(features, axis=-1, keepdims=True)
