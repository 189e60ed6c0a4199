"""Fused training ops on CPU and CUDA, one module each: import `flashtrain.ops.layer_norm`."""
