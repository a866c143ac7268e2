"""The project's configurations; choose one with --config=configs/video_tasks.py:PRESET.

tiny (the default): the real architecture, small, trained from scratch on sentences made from photographs that come with
scikit-image. No download, about five minutes on two CPU cores.

  python -m univid_jax.train --config=configs/video_tasks.py

wan_1_3b, wan_14b, wan_i2v_14b: the paper's training, a LoRA on Wan2.1. They start from a converted checkpoint, and make their
sentences from your folder of videos and photos (computed tasks), or from pairs of your own.

  python -m univid_jax.train --config=configs/video_tasks.py:wan_1_3b --config.init_from=wan2.1-t2v-1.3b \\
    --config.data.folder=DIR --workdir=runs/mine

The paper's recipes are one override away: one task (--config.data.tasks.NAME=1.0 and 0.0 for the others), one context for a
task (--config.data.contexts.I=1.0 ...), more shots (--config.data.num_clips.clips_6=1.0).
"""

import ml_collections


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
  presets = {"tiny": tiny, "wan_1_3b": wan_1_3b, "wan_14b": wan_14b, "wan_i2v_14b": wan_i2v_14b}
  if preset not in presets:
    raise ValueError(f"unknown preset {preset!r}; there are {', '.join(presets)}")
  return presets[preset]()


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
      # What of a block the backward pass computes again: full (all), attention (all else), dots (no products) or none.
      # Recomputing is faster on a CPU than storing what a small model needs.
      "remat": "full", "dtype": "float32", "param_dtype": "float32",
      # full: every token sees its whole sentence, as in UniVid. context_causal: context sees only context, so that sampling
      # computes it once and not in every step.
      "attention": "full",
      # Of self-attention: xla, cudnn (NVIDIA), splash (TPU); auto takes the platform's fastest.
      "attention_backend": "auto",
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

  config.data = _data()
  # A row holds two sentences of context III, one each of I and II, or three of II.
  config.rows = ml_collections.ConfigDict({
      # 0: as many rows as data x fsdp x microbatches.
      "per_batch": 8, "num_tokens": 192, "num_sentences": 3,
      # Rows that are filled at the same time, and whether a sentence goes to the first with room for it or to the fullest.
      "packing_bins": 64, "packing": "first_fit",
      # Tokens of prompts, one of padding for each included; the null prompt is that one alone.
      "num_text_tokens": 3,
      # Tokens of targets; 0: half of num_tokens, enough where a target is no longer than its query.
      "num_target_tokens": 0,
      # Independent streams of rows; 0: one a process. With a fixed number the batches do not depend on how many processes run.
      "streams": 0,
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

  # While training (0: never): the loss of so many held-out sentences at fixed noise levels and noise, and pictures of some.
  config.validation = ml_collections.ConfigDict({
      "every_steps": 250, "sentences": 24, "sigmas": (0.3, 0.6, 0.9), "previews": 6, "num_inference_steps": 2,
  })
  # After training (0: not at all): sentences a task and context on held-out photographs, sampled in so many steps.
  config.eval = ml_collections.ConfigDict({
      "sentences_per_case": 32, "num_inference_steps": 2, "seed": 1,
      # Sentences that `python -m univid_jax.evaluate` paints together; when it is stopped, no more than these are lost.
      "batch_size": 8,
      # Of `python -m univid_jax.evaluate`: seeds to repeat with, and other numbers of steps to try.
      "num_seeds": 1, "more_steps": (),
      # How depth is brought onto the truth's scale: least_squares, median or none.
      "depth_alignment": "least_squares",
      # Of label maps: a file with each label's colour, a line R G B ("": Pascal VOC's, in which those of TFDS are painted), the
      # number of labels (0: as many as colours), and the label that does not count (-1: none).
      "palette": "", "num_labels": 0, "void_label": -1,
      # A folder or name of a CLIP model (needs the extra `clip`), for CLIP-T and CLIP-I; "" for neither.
      "clip_model": "",
  })
  return config


def _data() -> ml_collections.ConfigDict:
  """Where sentences come from and how they are drawn."""
  return ml_collections.ConfigDict({
      # What computed tasks are applied to: the bundled photographs (in colours of all kinds), a folder of your own.
      "bundled": True, "jitter": True, "folder": "",
      # Data of your own that show tasks: the reference's metadata.csv, a folder TASK/NAME/source.* and target.*, a JSONL file
      # of sentences, a TFDS data set (see data/datasets.py). Where one is given, computed tasks are only used with a folder.
      "metadata": "", "pairs": "", "manifest": "",
      "tfds": {"name": "", "split": "train", "data_dir": "", "task": "", "source": "image", "target": "target", "kind": "image",
               "test_split": ""},
      # What the targets of your own tasks are, {"TASK": KIND}: depth, normals, segmentation, edges or saliency. Evaluation has
      # their metrics then, and pictures of the first three are resized without mixing values. Of TFDS it is tfds.kind.
      "kinds": {},
      # Metres that white and black stand for in pictures of depth; black itself is unknown.
      "depth_range": (0.5, 10.0),
      # How often each is drawn.
      "weights": {"computed": 1.0, "metadata": 1.0, "pairs": 1.0, "manifest": 1.0, "tfds": 1.0},
      # Share of rows or pairs of your own that training does not see, for validation and evaluation; computed tasks are
      # validated on photographs that are never trained on. Where there is a test set (test_pairs, tfds.test_split) it is that
      # instead, with examples from the training.
      "held_out": 0.05, "test_pairs": "",
      # Rows that cannot be used end the run, or are left out and named.
      "allow_dropped": False,
      # Variants of each row or pair, that differ in context, direction and examples.
      "variants": 16,
      # Threads that read and encode.
      "num_threads": 1,
      # Other sizes, as HEIGHTxWIDTH: a clip of your own goes to the size that is nearest to its shape.
      "buckets": (),
      "fit": "crop", "fps": 0.0, "prompt_dropout": 0.0,
      # Where latents and prompt embeddings are kept; WORKDIR/cache by default.
      "cache": "",
      "height": 32, "width": 32, "num_frames": 5,
      # How often each task is drawn.
      "tasks": {"invert": 1.0, "swap_channels": 1.0, "duotone": 1.0, "camera_movement": 0.5,
                "scribble": 0.0, "moving_object": 0.0, "salient_object": 0.0, "inpainting": 0.0, "colorization": 0.0,
                "super_resolution": 0.0, "deblurring": 0.0, "denoising": 0.0, "deraining": 0.0, "low_light": 0.0,
                "greyscale": 0.0, "invert_brightness": 0.0, "flip": 0.0, "time_reversal": 0.0},
      # How often each context is drawn; tasks that make a video of an image (camera movement) have weights of their own.
      # The paper has 0.3, 0.3 and 0.4; images teach more in a minute than videos do.
      "contexts": {"I": 0.2, "II": 0.5, "III": 0.3, "IV": 0.0},
      "animating_contexts": {"I": 0.5, "II": 0.0, "III": 0.0, "IV": 0.5},
      # How often a sentence has 4, 6 or 8 clips.
      "num_clips": {"clips_4": 1.0, "clips_6": 0.0, "clips_8": 0.0},
      "reverse_probability": 0.0,
      "prompt": "null",
      # Different sentences before the first comes again, in another order.
      "num_sentences": 1_000_000,
  })


def wan_1_3b() -> ml_collections.ConfigDict:
  """The paper's training of Wan2.1-T2V-1.3B: LoRA of rank 16 at 832x480, videos of 17 frames.

  The paper takes 20 to 40 times 200 sentences a task. A row holds a sentence of context I and one of II, or two of III.
  """
  config = tiny()
  config.name = "wan_1_3b"
  config.num_steps = 4000
  config.model.update({"variant": "wan2.1-t2v-1.3b", "remat": "full", "dtype": "bfloat16", "param_dtype": "bfloat16",
                       "look_back": ()})
  config.codec.update({"latent_channels": 16, "spatial_stride": 8})
  config.lora.rank = 16
  config.data.update({"bundled": False, "jitter": False, "height": 480, "width": 832, "num_frames": 17, "prompt": "detailed"})
  config.data.num_threads = 8
  # Fixed sentences of computed tasks, whose latents are kept.
  config.data.num_sentences = 2000
  config.data.tasks.update({name: float(name in ("scribble", "camera_movement")) for name in config.data.tasks})
  config.data.contexts.update({"I": 0.3, "II": 0.3, "III": 0.4, "IV": 0.0})
  config.rows.update({"per_batch": 0, "num_tokens": 37504, "num_sentences": 6, "num_text_tokens": 768, "packing": "best_fit"})
  config.flow.stratified = False
  config.optimizer.update({"name": "adamw", "learning_rate": 1e-4, "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0})
  config.ema_decay = 0.0
  config.checkpoint.update({"every_steps": 200, "keep": 3})
  config.validation.update({"every_steps": 200, "sentences": 16, "previews": 2, "num_inference_steps": 20})
  config.eval.update({"sentences_per_case": 0, "num_inference_steps": 50, "batch_size": 1})
  return config


def wan_14b() -> ml_collections.ConfigDict:
  """The same for Wan2.1-T2V-14B, its weights spread over all devices."""
  config = wan_1_3b()
  config.name = "wan_14b"
  config.model.variant = "wan2.1-t2v-14b"
  config.mesh.update({"data": 1, "fsdp": -1})
  return config


def wan_i2v_14b() -> ml_collections.ConfigDict:
  """The same for Wan2.1-I2V-14B-480P, which also sees the first frame of A by CLIP and as latents."""
  config = wan_14b()
  config.name = "wan_i2v_14b"
  config.model.variant = "wan2.1-i2v-14b-480p"
  return config
