"""Errors of the transformer's forward pass in bfloat16 and float32, against diffusers' with the same weights.

  python -m benchmarks.precision [--against=torch] [--variant=wan2.1-t2v-1.3b] [--layers=4] [--frames=1]
      [--height=480 --width=832] [--out=FILE]

Random weights, four clips in a row, a prompt of 512 tokens. An error is the relative L2 distance to our float32 forward
pass at the highest precision of matrix products (an accelerator's default precision may be less). Every pass runs on
the default device. "peer" are diffusers' passes; in bfloat16 they keep in float32 what diffusers' `from_pretrained`
keeps in it.
"""

import dataclasses
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.steps import ModelFlags, diffusers_options
from benchmarks.timing import PEERS, write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.core.errors import UserError
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
MODEL = ModelFlags(FLAGS, height=480, width=832)
AGAINST = FLAGS.choice("against", None, PEERS[:1], "The peer, whose weights both models then have.")
OUT = FLAGS.string("out", "", "File for the figures as JSON.")

TIMESTEP = 500.0


def run_peer(options: dict[str, Any], size: tuple[int, int, int], folder: Path) -> None:
  """Writes diffusers' weights by official name, inputs and outputs to a folder."""
  import diffusers
  import torch
  from safetensors.torch import save_file

  from univid_jax.models.names import diffusers_table, name_from_diffusers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  kind = diffusers.WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  with torch.device(device), torch.no_grad():
    model = kind(**options).eval()
    for parameter in model.parameters():
      parameter.add_(0.02 * torch.randn_like(parameter))
    latents = torch.randn(1, options["in_channels"], *size)
    text = torch.randn(1, 512, options["text_dim"])

    def predict(dtype: Any) -> Any:
      time = torch.full((1,), TIMESTEP)
      return model(latents.to(dtype), time, text.to(dtype), return_dict=False)[0].float().cpu().contiguous()

    state = model.state_dict()
    table = diffusers_table("transformer", state)
    weights = {name_from_diffusers(table, name): value.cpu().contiguous() for name, value in state.items()}
    outputs = {"latents": latents.cpu(), "text": text.cpu(), "float32": predict(torch.float32)}
    torch.set_float32_matmul_precision("high")
    outputs["tf32"] = predict(torch.float32)
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
      if not kept & set(name.split(".")):
        parameter.data = parameter.data.to(torch.bfloat16)
    outputs["bfloat16"] = predict(torch.bfloat16)
  save_file(weights, folder / "weights.safetensors")
  save_file(outputs, folder / "outputs.safetensors")


def read_weights(shape: DiTConfig, path: Path) -> dict[tuple[str, ...], Any]:
  """Reads the arrays of our transformer, by path, from tensors with official names."""
  import numpy as np
  from safetensors.numpy import load_file

  from univid_jax.convert.layout import make_fills, match_fills

  weights, arrays = load_file(path), {}
  for fill in match_fills(make_fills("transformer", shape), {name: x.shape for name, x in weights.items()}):
    layers = [fill.from_original(weights[name]) for name in fill.names]
    arrays[fill.path] = np.stack(layers) if fill.stacked else layers[0]
  return arrays


def run_ours(shape: DiTConfig, size: tuple[int, int, int], folder: Path, out: str) -> None:
  """Prints the errors of our passes, and of the peer's if there are any in the folder, and writes them to a file."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from safetensors.numpy import load_file

  from univid_jax.core.options import AttentionBackend
  from univid_jax.core.sentence import Role, Sentence
  from univid_jax.data.rows.packing import RowShape, pack
  from univid_jax.data.rows.tokens import sentence_features, unpatchify
  from univid_jax.models.dit import DiT

  peer = load_file(folder / "outputs.safetensors") if (folder / "outputs.safetensors").exists() else {}
  rng = np.random.default_rng(0)
  latents = peer["latents"][0] if peer else rng.normal(size=(shape.in_dim, *size)).astype(np.float32)
  text = peer["text"][0] if peer else rng.normal(size=(512, shape.text_dim)).astype(np.float32)
  features = sentence_features(
    Sentence(clips=(np.moveaxis(latents, 0, -1),), roles=(Role.TARGET,)),
    patch_size=shape.patch_size,
    text_len=shape.text_len,
    prompt_embedding=text,
  )
  row_shape = RowShape(num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1)
  row = dataclasses.replace(pack([features], row_shape), key_intervals=None, text_intervals=None, modulation_ids=None)

  def build(dtype: str, backend: AttentionBackend) -> DiT:
    kind = jnp.dtype(dtype)
    return DiT(shape, dtype=kind, param_dtype=kind, attention_backend=backend, rngs=nnx.Rngs(0))

  flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build("float32", AttentionBackend.XLA)), nnx.Param))
  if peer:
    arrays = read_weights(shape, folder / "weights.safetensors")
  else:
    arrays = {tuple(map(str, path)): (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in flat}

  def predict(dtype: str, precision: str | None = None, backend: AttentionBackend = AttentionBackend.AUTO) -> Any:
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(dtype, backend)))
    leaves = [(path, leaf.replace(jnp.asarray(arrays[tuple(map(str, path))], dtype))) for path, leaf in flat]
    run = jax.jit(lambda params, row: nnx.merge(graph, params)(row.tokens, jnp.full((1, 1), TIMESTEP), row))
    with jax.default_matmul_precision(precision):
      out = run(nnx.from_flat_state(leaves), jax.tree.map(jnp.asarray, row))
    return np.moveaxis(unpatchify(np.asarray(out[0], np.float32), size, shape.patch_size), -1, 0)

  reference = predict("float32", "highest").astype(np.float64)
  passes = {
    "bfloat16": lambda: predict("bfloat16"),
    **{f"peer, {name}": lambda name=name: peer[name][0] for name in ("bfloat16", "float32", "tf32") if peer},
    "float32, default precision": lambda: predict("float32"),
    "bfloat16, attention xla": lambda: predict("bfloat16", backend=AttentionBackend.XLA),
  }
  errors: dict[str, float] = {}
  for name, run in passes.items():
    errors[name] = float(np.linalg.norm(run() - reference) / np.linalg.norm(reference))
    write_json(out, {"shape": dataclasses.asdict(shape), "latents": size, "errors": errors})
    print(f"{name:<28}{errors[name]:.2e}", flush=True)


@app.command(FLAGS)
def main() -> None:
  shape = MODEL.shape
  stride = find_autoencoder(shape.out_dim).spatial_stride
  size = 4 * MODEL.frames.value, MODEL.height.value // stride, MODEL.width.value // stride
  context = multiprocessing.get_context("spawn")
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if AGAINST.value:
      peer = context.Process(target=run_peer, args=(diffusers_options(shape), size, folder))
      peer.start()
      peer.join()
      if peer.exitcode:
        print("the peer failed: ours alone, with other weights", flush=True)
    ours = context.Process(target=run_ours, args=(shape, size, folder, OUT.value))
    ours.start()
    ours.join()
    if ours.exitcode:
      raise UserError("a forward pass failed; the traceback is above")


if __name__ == "__main__":
  sys.exit(main())
