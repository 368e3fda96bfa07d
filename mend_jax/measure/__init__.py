"""What the commands benchmark and scaling measure and compute."""
