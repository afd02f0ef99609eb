"""The `evaluate` module for detection average precision; its folder is what `evaluate.load` takes."""
