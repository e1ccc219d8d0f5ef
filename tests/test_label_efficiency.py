"""label_efficiency.py: scores of the encoder beside baselines, for each number of labels."""

from helpers import run

import label_efficiency


def test_label_efficiency_compares_with_baselines(workplace, tmp_path):
    results = run(
        label_efficiency,
        checkpoint_path=workplace / "pretrained/best.pt",
        base_path=workplace,
        dataset_name="toy",
        output_dir=tmp_path / "out",
        label_counts="20,60",
        seeds=2,
    )
    assert len(results) == 2 * 2 * 3
    assert {row["model"] for row in results} == set(label_efficiency.models(0))
    assert all(0 <= row["macro_f1"] <= 1 for row in results)
    assert (tmp_path / "out/label_efficiency.png").exists()
