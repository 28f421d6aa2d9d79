"""Text to HDF5 shards of pre-sampled span masks. Start at `build.py`; the format is `shards.py`."""
