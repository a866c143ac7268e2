"""Computations that XLA compiles to slow programs on CPUs, in forms that it compiles well.

Times are for float32 on two cores of an AMD EPYC; docs/benchmarks/cpu.md has the details.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def compiler_options(dtype: DTypeLike) -> dict[str, str]:
  """Returns the options to compile a training step with.

  In float32 they select XLA's own matrix products instead of YNNPACK's, JAX's default in 0.10 to 0.12: the default run
  takes two thirds of the time, and a LoRA step on 4 blocks of the 1.3B takes 3.45 instead of 3.82 GiB. In bfloat16,
  YNNPACK's products are two to five times as fast where there is AMX. The option is experimental:
  tests/test_platform.py fails if an upgrade drops it.
  Benchmark: `python -m benchmarks.train_step --pairs=3`.
  """
  return {} if jnp.dtype(dtype) == jnp.bfloat16 else {"xla_cpu_experimental_ynn_fusion_type": ""}


def conv_in_time(
  x: Float[Array, "t y x c"],
  kernel: Float[Array, "_t _y _x c d"],
  *,
  strides: tuple[int, int, int],
  padding: int,
  zero_frames: int,
) -> Float[Array, "_t _y _x d"]:
  """Convolves over (t, y, x) by summing convolutions over (y, x); see `codecs.vae_layers.Convolution`.

  XLA's own convolutions over time take 2.4 times as long on a CPU: the autoencoder takes 12.4 s instead of 30.7 s to
  encode 5 frames of 416 x 240, 21.5 s instead of 51.8 s to decode them, and a tenth more memory.
  Benchmark: `python -m benchmarks.vae --mode=encode --frames=5 --height=240 --width=416`.
  """
  (time_stride, *plane_strides), sides = strides, ((padding, padding),) * 2
  # Keeps XLA from computing early, and storing, what depends on the cached frames alone, which takes a fifth more
  # memory.
  x = jax.lax.optimization_barrier(x)

  def convolve_frame(start: int) -> Array:
    taps = [
      jax.lax.conv_general_dilated(
        x[start + tap][None], kernel[tap], plane_strides, sides, dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
      for tap in range(len(kernel))
      if start + tap >= 0  # frames before x are zero and add nothing
    ]
    return sum(taps[1:], start=taps[0])

  # Unrolled: a chunk has few frames, and a loop over them takes more memory than the frames themselves.
  return jnp.concatenate(
    [convolve_frame(start) for start in range(-zero_frames, len(x) - len(kernel) + 1, time_stride)]
  )


@jax.custom_vjp
def project_up(x: Float[Array, "... r"], up: Float[Array, "r o"]) -> Float[Array, "... o"]:
  """Returns x @ up for a narrow x, with a gradient of `up` whose product takes x first.

  JAX puts the wide gradient of the output first, and XLA on CPUs then transposes all of it: a LoRA step on 4 blocks of
  the 1.3B takes 23.2 s instead of 28.8 s, and 3.68 instead of 4.02 GiB.
  Benchmark: `python -m benchmarks.train_step --pairs=2`.
  """
  return x @ up


def _project_up_forward(x: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
  return x @ up, (x, up)


def _project_up_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, up = saved
  tokens = tuple(range(x.ndim - 1))
  return gradient @ up.T, jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())))


project_up.defvjp(_project_up_forward, _project_up_backward)


def tensordot(x: Float[Array, "..."], kernel: Float[Array, "..."], num_dims: int) -> Float[Array, "..."]:
  """Returns the product over the last num_dims dims of x and the first ones of a kernel, of one dtype.

  bfloat16 matrices are multiplied and summed in float32, in the gradients too, and rounded afterwards, for which
  YNNPACK uses AMX. Written otherwise, XLA converts both to float32 first.
  """
  if x.dtype != jnp.bfloat16:
    return jnp.tensordot(x, kernel, num_dims)
  tokens, outputs = x.shape[: x.ndim - num_dims], kernel.shape[num_dims:]
  in_dim = math.prod(kernel.shape[:num_dims])
  return _multiply_bfloat16(x.reshape(*tokens, in_dim), kernel.reshape(in_dim, -1)).reshape(*tokens, *outputs)


@jax.custom_vjp
def _multiply_bfloat16(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
  return _contract(x, kernel, [x.ndim - 1], [0])


def _multiply_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return _multiply_bfloat16(x, kernel), (x, kernel)


def _multiply_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  (x, kernel), tokens = saved, range(gradient.ndim - 1)
  return _contract(gradient, kernel, [len(tokens)], [1]), _contract(x, gradient, tokens, tokens)


_multiply_bfloat16.defvjp(_multiply_forward, _multiply_backward)


def _contract(a: Array, b: Array, a_dims: Iterable[int], b_dims: Iterable[int]) -> Array:
  dims = (tuple(a_dims), tuple(b_dims)), ((), ())
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(a.dtype)
