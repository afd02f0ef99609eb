"""The `evaluate` module for mean intersection over union; its folder is what `evaluate.load` takes."""
