"""What the commands do: configuration, training, resuming, fine-tuning, evaluation."""

__version__ = "0.1.0"
