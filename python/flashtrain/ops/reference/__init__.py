"""Each op in plain torch: the definitions that the kernels are tested against.

They are differentiable, run on any device, and make no attempt to be fast. `compute_dtype` selects
between

  None           the expression as one writes it in torch, in the given dtypes: the baseline in the
                 same low precision;
  torch.float64  every input is cast first: the exact answer. Gradients come in the inputs' dtypes
                 unless the inputs are float64 already.
"""
