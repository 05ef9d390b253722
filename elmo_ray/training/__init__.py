"""One training step, the loop around it, checkpoints, and the runner on Ray Train."""
