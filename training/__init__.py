"""How encoders learn: what pretraining takes from the data, and the loop of fine-tuning."""
