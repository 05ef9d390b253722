"""Files of other programs: bilm-tf weights, options and checkpoints."""
