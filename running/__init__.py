"""How any script runs: errors, config, start and stop, device, files, checkpoints, log."""
