"""What it means: what people read."""
