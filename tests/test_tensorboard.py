"""What TensorBoard shows of each stage: curves and where they lie, and pictures."""
import io
import json

import numpy as np
import pytest
from conftest import FINETUNE, LINEPROB, PRETRAIN, run, scalars
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.toy_data import ToyCIFAR

CLASSES = ToyCIFAR(10).classes
TRAINING = {"train_loss", "lr", "train/gradient_norm", "train/images_per_second", "train/peak_memory_gib"}


# Of each script: its flags, the steps of an epoch (of 127 images without the incomplete batch, of 25 and of 41 drawn),
# and the epochs evaluated.
@pytest.mark.slow
@pytest.mark.parametrize("script, flags, batches, evaluated", [
    (PRETRAIN, [], 3, [2]), (LINEPROB, ["--num_samples", 3, "--eval_freq", 2], 1, [1, 2]),
    (FINETUNE, ["--num_samples", 6, "--sampling_freq", 1], 2, [0, 1, 2])])
def test_curves_hold_the_figures_of_log_txt_at_thousandths_of_an_epoch(
        script, flags, batches, evaluated, few_images, tmp_path):
    run(script, tmp_path, "--epochs", 3, "--batch_size", 32, *flags)
    curves = {tag: dict(points) for tag, points in scalars(tmp_path).items()}
    middles = [1000 * epoch + round(1000 * (i + 0.5) / batches) for epoch in range(3) for i in range(batches)]
    assert list(curves["train_loss"]) == list(curves["lr"]) == list(curves["train/gradient_norm"]) == middles
    assert list(curves["train/images_per_second"]) == list(curves["train/peak_memory_gib"]) == [999, 1999, 2999]
    expected = {}
    for record in [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]:
        start = 1000 * record["epoch"]
        losses = [curves["train_loss"][step] for step in middles if start <= step < start + 1000]
        assert np.mean(losses) == pytest.approx(record["train_loss"])
        for name, value in record.items():
            if name.startswith(("test", "knn")) and isinstance(value, float):
                expected.setdefault("/".join(name.rsplit("_", 1)), {})[start + 999] = value
        for figures in record.get("drawn", []):
            for name in figures.keys() - {"class"}:
                tag = f"train_ipdpp/{CLASSES[figures['class']]}/{name}"
                expected.setdefault(tag, {})[start] = figures[name]
    assert list(expected["knn/acc1" if script == PRETRAIN else "test/acc1"]) == [1000 * e + 999 for e in evaluated]
    assert curves.keys() == TRAINING | expected.keys()
    for tag, points in expected.items():
        assert curves[tag] == pytest.approx(points), tag


def picture(folder, tag):
    """The only picture under a tag, uint8 (H, W, 3)."""
    event, = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images(tag)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_views_lie_in_pairs_that_differ(few_images, tmp_path):
    run(PRETRAIN, tmp_path, "--epochs", 1, "--batch_size", 60)
    sheet = picture(tmp_path, "input/two views of each image, side by side")
    views = sheet.reshape(8, 16, 8, 16, 3).swapaxes(1, 2).reshape(32, 2, 16, 16, 3)  # rows, columns; pixels of each
    assert all((first != second).any() for first, second in views)
