"""Weights in 8 bits, as ComfyUI, musubi-tuner and others store them: dequantised when they are read.

A weight is its stored number, times a scale if there is one: in float32 with a scale, else in bfloat16, which holds
every 8-bit float. Both are exact: readers of these files compute the same product.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo, numpy_dtype
from univid_jax.convert.prefixes import strip_prefix
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json

# Endings of names, after that of the layer.
WEIGHT = ".weight"
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
ACTIVATION_SCALES = (".scale_input", ".input_scale")
FORMAT = ".comfy_quant"

# Entry of a safetensors header that describes layers like their `FORMAT` tensors.
METADATA = "_quantization_metadata"

# The formats that are a number times a scale, and the dtype of the number; others are refused by name.
SCALED_FORMATS = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "int8_tensorwise": "int8"}
# Options of a format that change what its numbers mean.
REFUSED_OPTIONS = ("convrot",)

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Quantization:
  """What a file says about its weights in 8 bits.

  Attributes:
    formats: the dtype of the weight's numbers by layer, where the file names it.
    scales: the name of the weight's scale by layer.
    activation_scales: names of the scales of activations, which weights do not need.
    descriptions: names of the tensors that name formats.
  """

  formats: Mapping[str, str]
  scales: Mapping[str, str]
  activation_scales: tuple[str, ...]
  descriptions: tuple[str, ...]


def dequantize(tensors: TensorFile) -> tuple[TensorFile, tuple[str, ...]]:
  """Returns weights, 8-bit ones dequantised, and the names of the scales of activations, which are dropped.

  Args:
    tensors: of one part of a model, names without prefix.

  Raises:
    UserError: a format is unsupported, or a scale has no weight or does not fit it.
  """
  found = _find_quantization(tensors)
  helpers = {*found.scales.values(), *found.activation_scales, *found.descriptions}
  infos, stored, dtypes, scales = {}, dict(tensors.stored), {}, {}
  for name, info in tensors.infos.items():
    if name in helpers:
      continue
    infos[name] = info
    layer = name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else ""
    dtype, scale = found.formats.get(layer, info.dtype), found.scales.get(layer)
    if info.dtype not in (dtype, "uint8"):
      raise UserError(f"{tensors.path}: {name} is {info.dtype}, but the file says that it is {dtype}")
    if scale is not None:
      _check_scale(tensors, name, scale, dtype)
      scales[name] = scale
    if scale is not None or dtype in FLOAT8:
      dtypes[name] = dtype
      infos[name] = TensorInfo(info.shape, "bfloat16" if scale is None else "float32")
      stored[name] = stored.get(name, dtype) + ("" if scale is None else " with scales")

  def read(name: str) -> np.ndarray:
    values = tensors.read(name)
    if name in dtypes:
      values = _decode(values, dtypes[name], infos[name].dtype)
    return _multiply(values, tensors.read(scales[name])) if name in scales else values

  def read_float8(name: str) -> tuple[np.ndarray, np.ndarray] | None:
    scale = tensors.read(scales[name]) if name in scales else np.ones(1)
    shape = infos[name].shape
    if dtypes.get(name) != "float8_e4m3fn" or len(shape) != 2:
      return None
    factors = _scale_shapes(shape, scale.shape)
    if factors is None or factors[1] not in ((1, 1), (shape[0], 1)):
      return None
    rows = np.broadcast_to(scale.reshape(factors[1]).astype(np.float32), (shape[0], 1))
    return tensors.read(name).reshape(shape).view(np.uint8).view(numpy_dtype("float8_e4m3fn")), rows

  new = dataclasses.replace(tensors, infos=infos, read=read, stored=stored, read_float8=read_float8)
  return new, found.activation_scales


def _find_quantization(tensors: TensorFile) -> Quantization:
  names = tensors.infos.keys()
  descriptions = tuple(name for name in names if name.endswith(FORMAT))
  formats = {layer: _parse_format(tensors, layer, value) for layer, value in _read_metadata(tensors).items()}
  for name in descriptions:
    layer = name.removesuffix(FORMAT)
    formats[layer] = _parse_format(tensors, layer, _read_format(tensors, name))
  scales: dict[str, str] = {}
  for name in names:
    if suffix := next((suffix for suffix in WEIGHT_SCALES if name.endswith(suffix)), None):
      layer = name.removesuffix(suffix)
      if f"{layer}{WEIGHT}" not in names or layer in scales:
        raise UserError(f"{tensors.path}: {name} must be the only scale of {layer}{WEIGHT}, which must exist")
      scales[layer] = name
  return Quantization(formats, scales, tuple(name for name in names if name.endswith(ACTIVATION_SCALES)), descriptions)


def _parse_format(tensors: TensorFile, layer: str, value: Any) -> str:
  """Returns the dtype of the numbers of a format; raises UserError if the format is not supported."""
  kind, options = (value.get("format"), value) if isinstance(value, Mapping) else (value, {})
  nested = options.get("params")
  used = [
    option for option in REFUSED_OPTIONS if {**options, **(nested if isinstance(nested, dict) else {})}.get(option)
  ]
  if not isinstance(kind, str) or kind not in SCALED_FORMATS or used:
    raise UserError(
      f"{tensors.path}: {layer} is quantised as {' with '.join([str(kind), *used])}, which is not supported; supported "
      f"are {', '.join(SCALED_FORMATS)}"
    )
  return SCALED_FORMATS[kind]


def _read_format(tensors: TensorFile, name: str) -> Any:
  """Reads the JSON in a tensor of bytes."""
  info = tensors.infos[name]
  if info.dtype not in ("uint8", "int8") or info.nbytes > 1 << 16:
    raise UserError(f"{tensors.path}: {name} is {info.dtype} {info.shape}, expected a short text in uint8")
  try:
    return parse_json(tensors.read(name).tobytes())
  except ValueError as error:
    raise UserError(f"{tensors.path}: {name} is not valid JSON: {error}") from error


def _read_metadata(tensors: TensorFile) -> dict[str, Any]:
  """Returns what the header says about layers of this part of the model."""
  text = tensors.metadata.get(METADATA)
  if text is None:
    return {}
  try:
    layers = {strip_prefix(layer)[1]: value for layer, value in parse_json(text)["layers"].items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{tensors.path}: the entry {METADATA} of its header is damaged ({error!r})") from error
  return {layer: value for layer, value in layers.items() if f"{layer}{WEIGHT}" in tensors.infos}


def _check_scale(tensors: TensorFile, weight: str, scale: str, dtype: str) -> None:
  info, shape = tensors.infos[scale], tensors.infos[weight].shape
  if info.dtype not in FLOATS:
    raise UserError(f"{tensors.path}: {scale} is {info.dtype}, expected one of {', '.join(FLOATS)}")
  if dtype not in (*FLOATS, *SCALED_FORMATS.values()):
    raise UserError(f"{tensors.path}: {weight} is {dtype} with scales, and the file does not name its format")
  if _scale_shapes(shape, info.shape) is None:
    raise UserError(
      f"{tensors.path}: {scale} {info.shape} does not fit {weight} {shape}: expected one number, one per row, or one "
      "per block of a row"
    )


def _scale_shapes(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Returns the shapes in which weight and scale are multiplied, None if the scale does not fit."""
  if all(n == 1 for n in scale):
    return weight, (1,) * len(weight)
  if not weight:
    return None
  if scale == weight[:1]:
    return weight, (*scale, *(1,) * (len(weight) - 1))
  if len(scale) == len(weight) and all(n in (1, size) for n, size in zip(scale, weight)):
    return weight, scale
  if len(scale) == len(weight) + 1 and scale[:-2] == weight[:-1] and scale[-1] == 1:
    blocks = scale[-2]
    return ((*weight[:-1], blocks, weight[-1] // blocks), scale) if blocks and weight[-1] % blocks == 0 else None
  return None


def _decode(values: np.ndarray, dtype: str, target: str) -> np.ndarray:
  """Returns stored numbers in another dtype, which holds them exactly."""
  if dtype not in FLOAT8:
    return values.view(numpy_dtype(dtype)).astype(numpy_dtype(target))
  # By a table: five times as fast as a cast.
  table = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(numpy_dtype(target))
  integer = f"uint{8 * table.itemsize}"  # because NumPy is fast, and releases Python's lock, for its own dtypes only
  return table.view(integer)[values.reshape(-1).view(np.uint8)].view(table.dtype).reshape(values.shape)


def _multiply(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Multiplies weights in place by their scale, in float32."""
  shapes = _scale_shapes(values.shape, scale.shape)
  assert shapes is not None  # checked by _check_scale
  product = values.reshape(shapes[0])
  with np.errstate(all="ignore"):  # NaN and infinite weights are reported by the converter
    product *= scale.reshape(shapes[1]).astype(np.float32)
  return product.reshape(values.shape)
