"""How good is it: classifiers, scores, differences, validation."""
