"""irisml jobs on iris_hf: its engine, its other tasks, and the tasks of this library by their names.

The package irisml is needed only when something here is called: `pip install "iris-hf[irisml]"`.
"""

from iris_hf.irisml.names import install, installed, uninstall
from iris_hf.irisml.run import run_job

__all__ = ["install", "installed", "run_job", "uninstall"]
