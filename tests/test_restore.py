"""``palette test``: every picture under its own name, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from palette import config as configs
from palette.build import build_datasets, build_network
from palette.data.dataset import UnreadableImages
from palette.pipeline import Pipeline
from palette.restore import RESULTS, restore


@pytest.mark.parametrize("workers", [0, 1])
def test_no_stand_in_is_scored_under_a_damaged_pictures_name(tmp_path: Path, workers: int) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8), (40 * number,) * 3).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"")
    config = configs.from_yaml(
        "model: {channels: 32, channel_mults: [1], res_blocks: 1, attention_resolutions: []}\n"
        f"data: {{source: folder, path: {tmp_path / 'in'}, image_size: 8, shuffle: false,"
        " validation: 0, flip: false}\ntask: {mask: center}\nsample: {steps: 1}\n"
    )
    model = Pipeline(build_network(config), config, device="cpu", precision="float32")
    dataset, _ = build_datasets(config)
    with pytest.raises(UnreadableImages, match=r"3\.png: empty file; a test takes all") as caught:
        restore(model, dataset, tmp_path, batch_size=2, workers=workers)
    assert "\n" not in str(caught.value)
    written = sorted(path.name for path in (tmp_path / RESULTS).iterdir())
    assert written == sorted(
        f"{kind}_{number}.png" for kind in ("GT", "Mask", "Out", "Process") for number in (0, 1)
    )
