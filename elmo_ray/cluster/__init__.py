"""Use of Ray: starting or joining it, tasks, training on workers, stopping, and the workers' logs."""
