"""Shards to checkpoints. Read `layout.py` first: it is the heart of the PMLM; then `model.py` and `train.py`."""
