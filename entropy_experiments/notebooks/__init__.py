"""Notebooks that come with the package; `entropy-experiments explore FOLDER` opens them."""
