"""The trainer: loop, optimizer, schedule, checkpoints, logs and the launcher of its processes."""
