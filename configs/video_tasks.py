"""The presets of `univid_jax.config.presets`, under the path that scripts in a clone use.

python -m univid_jax.train --config=configs/video_tasks.py[:PRESET]
"""

from univid_jax.config.presets import get_config

__all__ = ["get_config"]
