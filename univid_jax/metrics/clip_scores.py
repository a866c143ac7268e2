"""CLIP-T and CLIP-I, through PyTorch and transformers (the extra `clip`)."""

import functools

import numpy as np


class CLIPScores:
  """Similarities in CLIP's space (Radford et al. 2021).

  Args:
    path: a CLIP model as transformers keeps it, a folder or a name of the Hugging Face hub.

  Raises:
    ModuleNotFoundError: the extra is not installed.
  """

  def __init__(self, path: str):
    try:
      import transformers
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError("CLIP scores need PyTorch and transformers: pip install 'univid_jax[clip]'") from error
    self._model = transformers.CLIPModel.from_pretrained(path).eval()
    self._processor = transformers.CLIPProcessor.from_pretrained(path)

  def clip_t(self, clip: np.ndarray, text: str) -> float:
    """100 times the cosine of a clip (uint8 (T, H, W, 3), mean over frames) and a text; higher is better."""
    return 100 * float(np.mean(self._images(clip) @ self._text(text)))

  def clip_i(self, clip: np.ndarray, other: np.ndarray) -> float:
    """The cosine of two clips' mean embeddings; 1 is best."""
    a, b = (self._images(x).mean(axis=0) for x in (clip, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

  def _images(self, clip: np.ndarray) -> np.ndarray:
    return self._unit(self._model.get_image_features(**self._processor(images=list(clip), return_tensors="pt")))

  @functools.lru_cache(maxsize=64)  # noqa: B019 (one object a report)
  def _text(self, text: str) -> np.ndarray:
    inputs = self._processor(text=[text], return_tensors="pt", padding=True, truncation=True)
    return self._unit(self._model.get_text_features(**inputs))[0]

  @staticmethod
  def _unit(features) -> np.ndarray:
    features = getattr(features, "pooler_output", features).detach().numpy()
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
