"""What the commands do: configuration, training, going on, fine-tuning, evaluation."""
