"""Frozen blocks in host memory, in a form of which TPUs can copy a slice without copying the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from univid_jax.models.quantized import QuantizedKernel, in_words, is_quantized
from univid_jax.parallel.host_memory import KIND


def offload_blocks(abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Returns descriptions of a transformer's parameters with the matrices of its blocks in host memory.

  Stacks of vectors stay on the devices: they are small, and TPUs cannot copy just one of the two bfloat16 numbers in a
  word.
  """

  def move(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    is_matrix = len(x.shape) > 2
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(KIND)) if is_matrix else x

  return {**abstract, "blocks": jax.tree.map(move, abstract["blocks"])}


def describe_in_words(abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Returns descriptions of parameters with the blocks' quantised kernels in words, where sharding allows it."""

  def describe(x: Any) -> Any:
    if not isinstance(x, QuantizedKernel):
      return x
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    words, sharding = jax.eval_shape(in_words, plain).numbers, x.numbers.sharding
    if not _divides(words.shape, sharding):
      return x
    return dataclasses.replace(x, numbers=jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding))

  return {**abstract, "blocks": jax.tree.map(describe, abstract["blocks"], is_leaf=is_quantized)}


def put_in_words(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns parameters as `describe_in_words` describes them, converting one kernel after another on the devices.

  A kernel's bytes are deleted as soon as its words exist, because there may be no room for two bases.
  """

  def convert(x: Any, described: Any) -> Any:
    if not isinstance(x, QuantizedKernel) or x.numbers.dtype == described.numbers.dtype:
      return x
    sharding = x.numbers.sharding
    on_devices = dataclasses.replace(x, numbers=jax.device_put(x.numbers, jax.memory.Space.Device))
    numbers = jax.device_put(_words_of(on_devices), sharding)
    jax.block_until_ready(numbers)
    x.numbers.delete()
    return dataclasses.replace(x, numbers=numbers)

  described = describe_in_words(params)
  return {**params, "blocks": jax.tree.map(convert, params["blocks"], described["blocks"], is_leaf=is_quantized)}


def _words_of(kernel: QuantizedKernel) -> jax.Array:
  sharding = kernel.numbers.sharding
  return jax.jit(
    lambda numbers: in_words(dataclasses.replace(kernel, numbers=numbers)).numbers, out_shardings=sharding
  )(kernel.numbers)


def _divides(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> bool:
  try:
    sharding.shard_shape(shape)
  except ValueError:
    return False
  return True
