"""The page to explore: Python that packs it, JavaScript that runs it."""
