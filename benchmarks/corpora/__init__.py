"""Real English text and labelled data from Debian and PyPI packages; `python -m benchmarks.corpora --list`."""
