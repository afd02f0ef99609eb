"""The whole chain on two real processes: convert, sample, train, predict, score."""

import json
from pathlib import Path

from launching import run_ranks


def test_detection_and_segmentation_work_from_data_set_to_score_on_two_processes(tmp_path: Path) -> None:
    done = run_ranks(2, str(Path(__file__).with_name("chain_rank.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # every rank has all 13 predictions, and the same scores
    for result in first:
        assert 3 <= result["few"] <= 9
        assert result["train"] == 16
        assert result["predictions"] == 13
    assert first[0]["scores"]["num_images"] == 13
    assert first[1]["scores"]["num_pixels"] > 0
