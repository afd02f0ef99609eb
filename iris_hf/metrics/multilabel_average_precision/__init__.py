"""The `evaluate` module for multilabel average precision; its folder is what `evaluate.load` takes."""
