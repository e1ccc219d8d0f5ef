"""Map files and their pictures."""
