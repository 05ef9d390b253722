"""The data path from text on disk to batches; its map is at the head of `data/streams.py`."""
