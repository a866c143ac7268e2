"""The project's configurations; choose one with --config=configs/video_tasks.py:PRESET.

tiny (the default): the real architecture, small, trained from scratch on sentences made from photographs that come with
scikit-image. No download, about five minutes on two CPU cores.

  python -m univid_jax.train --config=configs/video_tasks.py
"""

import ml_collections

PRESETS = ("tiny",)


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
  return tiny()


def tiny() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.name = "tiny"
  config.seed = 0
  config.num_steps = 1600
  config.log_every = 20

  # The transformer: Wan2.1's, with fewer and narrower layers.
  config.model = ml_collections.ConfigDict({
      # A published model's name instead of all numbers below.
      "variant": "",
      "dim": 128, "ffn_dim": 256, "num_heads": 4, "num_layers": 4, "freq_dim": 64, "text_dim": 16,
      # Coarse positions: 4 rows and columns, up to 8 latent frames.
      "rope_theta": 10.0, "rope_scale": 1.57,
      # Recomputing the blocks is faster on a CPU than storing what they need.
      "remat": "full", "dtype": "float32", "param_dtype": "float32",
      # Heads that start out looking so many latent frames back; () for the plain random start.
      "look_back": (1, 2, 4),
  })
  # A converted checkpoint to start from; "" starts from random weights, with a codec that has none.
  config.init_from = ""
  config.codec = ml_collections.ConfigDict({"latent_channels": 16, "spatial_stride": 4})
  # How the autoencoder of a checkpoint cuts large frames: side of a tile in latents (0: not at all) and overlap.
  config.vae_tiling = ml_collections.ConfigDict({"size": 0, "overlap": 8})
  # Adapters to train instead of the whole model; rank 0: the whole model.
  config.lora = ml_collections.ConfigDict({
      "rank": 0, "alpha": 16.0, "targets": ("q", "k", "v", "o", "ffn.0", "ffn.2"), "dropout": 0.0, "rslora": False,
  })

  config.data = ml_collections.ConfigDict({
      # A folder of your own videos and photos, in addition to the bundled photographs.
      "folder": "",
      "height": 32, "width": 32, "num_frames": 5,
      # How often each task is drawn.
      "tasks": {"invert": 1.0, "swap_channels": 1.0, "duotone": 1.0, "camera_movement": 0.5},
      # How often each context is drawn; tasks that make a video of an image (camera movement) have weights of their own.
      # The paper has 0.3, 0.3 and 0.4; images teach more in a minute than videos do.
      "contexts": {"I": 0.2, "II": 0.5, "III": 0.3, "IV": 0.0},
      "animating_contexts": {"I": 0.5, "II": 0.0, "III": 0.0, "IV": 0.5},
      "num_clips": {"4": 1.0},
      "reverse_probability": 0.0,
      "prompt": "null",
      # Different sentences before the first comes again, in another order.
      "num_sentences": 1_000_000,
  })
  # A row holds two sentences of context III, one each of I and II, or three of II.
  config.rows = ml_collections.ConfigDict({
      "per_batch": 8, "num_tokens": 192, "num_sentences": 3, "packing_bins": 64,
      # Parts of a batch that go through the model one after another, for less memory and the same result.
      "microbatches": 1,
  })

  config.flow = ml_collections.ConfigDict({"shift": 5.0, "stratified": True, "objective": "univid"})
  config.optimizer = ml_collections.ConfigDict({
      "name": "muon", "learning_rate": 1e-2, "adam_learning_rate": 3e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8,
      "weight_decay": 0.01, "clip_norm": 1.0, "schedule": "linear", "warmup_steps": 50, "decay_fraction": 0.5,
  })
  config.ema_decay = 0.98
  config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})
  config.checkpoint = ml_collections.ConfigDict({"every_steps": 250, "keep": 2})

  # After training: sentences a task and context on held-out photographs, sampled in so many steps.
  config.eval = ml_collections.ConfigDict({"sentences_per_case": 32, "num_inference_steps": 2, "seed": 1})
  return config
