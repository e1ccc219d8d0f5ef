"""A trained encoder outside of these scripts: from Python, in other software, described."""
