"""Files of bilm-tf: HDF5 weights, options and TensorFlow checkpoints."""
