"""The irisml training tasks on the Hugging Face stack."""

from iris_hf._version import __version__

__all__ = ["__version__"]
