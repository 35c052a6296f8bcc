"""What the commands do: configuration, training, resuming, fine-tuning, evaluation."""
