"""The trainer: loop, optimizer, schedule, checkpoints, logging and the launcher of its processes."""
