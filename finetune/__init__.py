"""A pre-trained model to a task."""
