"""The `evaluate` module for accuracy; its folder is what `evaluate.load` takes."""
