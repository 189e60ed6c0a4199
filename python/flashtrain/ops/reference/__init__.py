"""What each op computes, in plain torch: the definitions that the kernels are tested against.

Differentiable, on any device, and without any attempt to be fast. `compute_dtype` selects between

  None           the expression as one writes it in torch, in the dtypes given: the baseline of the
                 same low precision;
  torch.float64  every input is cast first: the exact answer. Gradients come in the inputs' dtypes
                 unless the inputs are float64 already.
"""
