"""Fused training kernels, GPT models on them and a trainer.

Importing this package is cheap: no kernel, no torch. Import what you use:
`flashtrain.ops`, `flashtrain.models`, `flashtrain.train`.
"""

__version__ = "0.1.0"
