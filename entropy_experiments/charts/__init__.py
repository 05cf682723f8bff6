"""The charts behind ``entropy_experiments.plots``: one question a file, one look for all of them."""
