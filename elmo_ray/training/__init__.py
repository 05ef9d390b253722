"""Training in one worker: the input of steps, the step, the loop around it, metrics, and saving and resuming."""
