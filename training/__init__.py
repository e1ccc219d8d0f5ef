"""Fine-tuning: the loop that all its scripts share."""
