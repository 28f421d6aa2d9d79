"""The study: objectives of pre-training, and what they give to tasks, on real text at a size for two CPU cores."""
