"""How tiles are made: items, pixels, labels, statistics, simulation."""
