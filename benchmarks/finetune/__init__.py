"""Time of a fine-tuning run beside transformers' recipe."""
