"""The `evaluate` module for image-text retrieval; its folder is what `evaluate.load` takes."""
