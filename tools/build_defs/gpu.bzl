"""What marks a target as one that needs a GPU."""

load("@local_gpu//:defs.bzl", "HAS_GPU")

# A GPU is used by one test at a time.
GPU_TAGS = ["exclusive", "gpu"]

# For target_compatible_with: without a GPU the target is skipped, and an explicit request for it says what is missing.
REQUIRES_GPU = [] if HAS_GPU else [Label("//tools/build_defs:gpu")]
