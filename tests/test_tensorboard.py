"""What log.txt and TensorBoard hold of each stage: figures, curves and where they lie, pictures."""
import io
import json

import numpy as np
import pytest
from conftest import FINETUNE, LINEPROB, PRETRAIN, run, scalars
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.toy_data import ToyCIFAR

CLASSES = ToyCIFAR(10).classes
TRAINING = {"train_loss", "lr", "train/gradient_norm", "train/images_per_second"}
KNN = {f"knn_{name}" for name in ("acc1", "many", "medium", "few")}
TESTED = {f"test_{name}" for name in ("acc1", "acc5", "loss", "many", "medium", "few", "per_class")}
TESTED |= {f"test_adjusted_{name}" for name in ("acc1", "many", "medium", "few")}


# Of each script: its flags, the steps of an epoch (of 127 images without the incomplete batch, of 25 and of 41 drawn),
# the epochs evaluated and what is logged of them, and the epochs before which it draws.
@pytest.mark.slow
@pytest.mark.parametrize("script, flags, batches, evaluated, names, drawn", [
    (PRETRAIN, [], 3, [2], KNN, []), (LINEPROB, ["--num_samples", 3, "--eval_freq", 2], 1, [1, 2], TESTED, []),
    (FINETUNE, ["--num_samples", 6, "--sampling_freq", 1], 2, [0, 1, 2], TESTED, [0, 1])])
def test_log_and_curves_hold_the_same_at_thousandths_of_an_epoch(
        script, flags, batches, evaluated, names, drawn, few_images, tmp_path):
    history = run(script, tmp_path, "--epochs", 3, "--batch_size", 32, *flags)
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == history
    curves = {tag: dict(points) for tag, points in scalars(tmp_path).items()}
    middles = [1000 * epoch + round(1000 * (i + 0.5) / batches) for epoch in range(3) for i in range(batches)]
    assert list(curves["train_loss"]) == list(curves["lr"]) == list(curves["train/gradient_norm"]) == middles
    assert list(curves["train/images_per_second"]) == [999, 1999, 2999]
    expected = {}
    for epoch, record in enumerate(history):
        assert set(record) == {"epoch", "train_loss", "train_lr", "train_images"} | (
            names if epoch in evaluated else set()) | ({"drawn"} if epoch in drawn else set())
        losses = [curves["train_loss"][step] for step in middles if step // 1000 == epoch == record["epoch"]]
        assert np.mean(losses) == pytest.approx(record["train_loss"])
        for name in names & record.keys() - {"test_per_class"}:
            expected.setdefault("/".join(name.rsplit("_", 1)), {})[1000 * epoch + 999] = record[name]
        for figures in record.get("drawn", []):
            for name in figures.keys() - {"class"}:
                tag = f"train_ipdpp/{CLASSES[figures['class']]}/{name}"
                expected.setdefault(tag, {})[1000 * epoch] = figures[name]
    assert curves.keys() == TRAINING | expected.keys()
    for tag, points in expected.items():
        assert curves[tag] == pytest.approx(points), tag


def pictures(folder):
    """The last picture of each tag, uint8 (H, W, 3)."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
            for tag in events.Tags()["images"]}


def test_pictures_of_draws_and_of_views_in_pairs_that_differ(few_images, tmp_path):
    run(FINETUNE, tmp_path / "f", "--epochs", 1, "--num_samples", 20)
    assert pictures(tmp_path / "f").keys() == {
        f"train_ipdpp/{name}/most and least likely drawn" for name in CLASSES[:2]}  # of more than 20 images
    run(PRETRAIN, tmp_path / "p", "--epochs", 1, "--batch_size", 60)
    sheet = pictures(tmp_path / "p")["input/two views of each image, side by side"]
    views = sheet.reshape(8, 16, 8, 16, 3).swapaxes(1, 2).reshape(32, 2, 16, 16, 3)  # rows, columns; pixels of each
    assert all((first != second).any() for first, second in views)
