"""From text on disk to batches of word types: vocabulary, shards, encoding, streams."""
