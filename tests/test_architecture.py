"""What holds the house together: free imports, and imports that go downward only."""

import ast
from pathlib import Path

import pytest
from launching import run_python

PACKAGE = Path(__file__).parents[1] / "iris_hf"

LAYERS = [
    {"errors", "types", "_version"},
    {"losses"},
    {"data", "models", "metrics"},
    {"engine"},
    {"training", "inference", "export", "hub"},
    {"tasks"},
    {"cli_values", "irisml", "tables"},
    {"cli"},
    {"__main__"},
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":
        return
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{alias.name}" if node.module == "iris_hf" else str(node.module) for alias in node.names
            ]
        for name in names:
            if name.startswith("iris_hf.") and room(name) != here:
                assert height[room(name)] < height[here], f"{path.name} imports {name}"


def test_import_loads_no_heavy_library_and_touches_nothing() -> None:
    code = (
        "import os, random, logging, sys\n"
        "before = dict(os.environ), random.getstate(), list(logging.root.handlers)\n"
        "import iris_hf\n"
        "assert before == (dict(os.environ), random.getstate(), list(logging.root.handlers))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'train' in dir(iris_hf)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["torch", "torchvision", "accelerate", "numpy", "safetensors"])
def test_what_torch_only_tests_use_is_the_same_on_both_lines(package: str) -> None:
    files = sorted((PACKAGE.parent / "constraints").glob("*.txt"))
    pins = {line for file in files for line in file.read_text().splitlines() if line.startswith(f"{package}==")}
    assert len(files) == 2
    assert len(pins) == 1
