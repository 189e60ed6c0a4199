"""Whether this machine has a GPU."""

def has_gpu(rctx):
    """Whether an NVIDIA driver with a device runs on this machine.

    Args:
      rctx: the repository context.

    Returns:
      True if the driver's control device is there.
    """
    return rctx.path("/dev/nvidiactl").exists or rctx.path("/proc/driver/nvidia/version").exists
