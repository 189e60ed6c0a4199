"""In which number formats a step is computed.

| precision | weights, gradients, optimizer | matmuls                | loss scale |
|-----------|-------------------------------|------------------------|------------|
| fp32      | fp32                          | fp32                   | none       |
| tf32      | fp32                          | fp32 in, TF32 products | none       |
| bf16      | fp32 master weights           | bf16 under autocast    | none       |
| fp16      | fp32 master weights           | fp16 under autocast    | dynamic    |

Losses and norms are computed in fp32 in each.
bf16 and fp16 keep one copy of the weights, in fp32, and let `torch.autocast` cast them for each
matmul: 16 bytes per parameter (weight, gradient, two moments), plus the casts of one forward pass.
"""

import torch

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The autocast context and the loss scaler of one run."""

    def __init__(self, name: str, device: torch.device):
        self._device_type = device.type
        self._dtype = _AUTOCAST_DTYPES.get(name)
        # "highest" keeps fp32 matmuls exact; elsewhere what is left in fp32 may use TF32.
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """A context in which matmuls run in the low precision; does nothing for fp32 and tf32."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None)
