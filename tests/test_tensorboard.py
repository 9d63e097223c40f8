"""What TensorBoard shows of each stage: curves and where they lie, pictures, the projector, the table of flags."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_few
from conftest import run as run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch.utils.tensorboard._utils import figure_to_image

import main_cifar10_finetune_ipdpp
import main_cifar10_lineprob_bns
import main_cifar10_pretrain_bns
from util.run.pictures import accuracy_bars, class_balanced, confusion_heatmap
from util.toy_data import ToyCIFAR

pytestmark = pytest.mark.slow
EPOCHS = 3
CLASSES = ToyCIFAR(10).classes


def run(script, folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCIFAR, "__init__", draw_few)
        run_script(script, folder, "--input_size", 8, "--epochs", EPOCHS, "--batch_size", 32, *flags)
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    return run(main_cifar10_pretrain_bns, tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return run(main_cifar10_finetune_ipdpp, folder, "--num_samples", 6, "--sampling_freq", 1)


@pytest.fixture(scope="module")
def probing(tmp_path_factory):
    return run(main_cifar10_lineprob_bns, tmp_path_factory.mktemp("probe"), "--num_samples", 3, "--eval_freq", 2)


def steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def pixels(events, tag):
    """All images under `tag`, uint8 (H, W, 3) each, by step."""
    return {event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(tag)}


def hyperparameters(events):
    content = events.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
    return hparams_metadata.parse_session_start_info_plugin_data(content).hparams


TRAINING = {"train_loss", "lr", "train/gradient_norm", "train/images_per_second", "train/peak_memory_gib"}
TESTING = {"test/acc1", "test/acc5", "test/loss", "test/many", "test/medium", "test/few",
           "test_adjusted/acc1", "test_adjusted/many", "test_adjusted/medium", "test_adjusted/few"}
KNN = {"knn/acc1", "knn/many", "knn/medium", "knn/few"}
OF_A_DRAW = ("mean_p", "drawn_mean_p", "left_mean_p", "drawn_margin", "left_margin", "changed", "max_inclusion",
             "min_inclusion")
DRAWING = {f"train_ipdpp/{name}/{figure}" for name in CLASSES[:5] for figure in OF_A_DRAW}
FIGURES = {"test/accuracy per class", "test/confusion"}


def test_tags_of_each_stage(pretraining, probing, finetuning):
    assert set(pretraining.Tags()["scalars"]) == TRAINING | KNN
    assert set(probing.Tags()["scalars"]) == TRAINING | TESTING
    assert set(finetuning.Tags()["scalars"]) == TRAINING | TESTING | DRAWING
    assert set(pretraining.Tags()["images"]) == {"input/two views of each image, side by side"}
    assert set(probing.Tags()["images"]) == FIGURES
    assert set(finetuning.Tags()["images"]) == FIGURES | {
        f"train_ipdpp/{name}/most and least likely drawn" for name in CLASSES[:5]}


def test_steps_are_thousandths_of_an_epoch(pretraining, probing, finetuning):
    # 127 images without the incomplete batch, 41 drawn, 25 in the balanced subset
    for events, batches in ((pretraining, 3), (finetuning, 2), (probing, 1)):
        middles = [1000 * epoch + round(1000 * (i + 0.5) / batches) for epoch in range(EPOCHS) for i in range(batches)]
        assert steps(events, "train_loss") == steps(events, "lr") == middles
        assert steps(events, "train/images_per_second") == [999, 1999, 2999]
    assert steps(finetuning, "test/acc1") == steps(finetuning, "test/few") == [999, 1999, 2999]
    assert steps(pretraining, "knn/acc1") == [2999]  # --eval_freq 25, and the last epoch
    assert steps(probing, "test/acc1") == [1999, 2999]  # --eval_freq 2, and the last epoch
    assert steps(finetuning, "train_ipdpp/striped disc/mean_p") == [0, 1000]  # none in the last epoch


def test_curves_hold_the_figures_of_log_txt(pretraining, probing, finetuning):
    for events in (pretraining, probing, finetuning):
        records = [json.loads(line) for line in (Path(events.path) / "log.txt").read_text().splitlines()]
        found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        for tag in (TESTING | KNN) & set(found):
            name = tag.replace("/", "_")
            logged = {1000 * record["epoch"] + 999: record[name] for record in records if name in record}
            assert found[tag] == pytest.approx(logged), tag
        for record in records:
            for figures in record.get("drawn", []):
                for name, value in figures.items():
                    if name != "class":
                        tag = f"train_ipdpp/{CLASSES[figures['class']]}/{name}"
                        assert found[tag][1000 * record["epoch"]] == pytest.approx(value), tag
    assert [len(record.get("drawn", [])) for record in records] == [5, 5, 0]


def test_views_lie_in_pairs_that_differ(pretraining):
    sheet, = pixels(pretraining, "input/two views of each image, side by side").values()
    views = sheet.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(32, 2, 8, 8, 3)  # rows, columns; pixels of 8 x 8 images
    assert all((first != second).any() for first, second in views)


def test_projector_holds_balanced_features_labels_and_thumbnails(finetuning, few_images):
    folder = Path(finetuning.path)
    config = (folder / "projector_config.pbtxt").read_text()
    features, metadata, sprite = (folder / f"0000{EPOCHS}" / "test_features" / name
                                  for name in ("tensors.tsv", "metadata.tsv", "sprite.png"))
    assert all(str(path.relative_to(folder)) in config for path in (features, metadata, sprite))
    assert np.loadtxt(features).shape == (100, 96) and np.loadtxt(features).std() > 0.5
    header, *rows = [line.split("\t") for line in metadata.read_text().splitlines()]
    assert header == ["class", "predicted class", "training images"]
    train_set, test_set = ToyCIFAR(10), ToyCIFAR(10, train=False)
    assert [row[0] for row in rows] == [CLASSES[c] for c in test_set.targets]
    assert {(row[0], row[2]) for row in rows} == set(zip(CLASSES, map(str, train_set.class_counts), strict=True))
    thumbnails = np.asarray(Image.open(sprite)).reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    np.testing.assert_allclose(thumbnails.astype(int), test_set.data, atol=1)


def test_every_run_is_a_row_of_the_hyperparameter_table(pretraining, finetuning):
    assert hyperparameters(pretraining)["bns_form"].string_value == "published"
    assert hyperparameters(pretraining)["epochs"].number_value == EPOCHS
    assert hyperparameters(finetuning)["ipdpp_sampler"].string_value == "exact"
    # With an Experiment summary, TensorBoard would show the columns of one stage for all.
    assert hparams_metadata.EXPERIMENT_TAG not in {**pretraining.summary_metadata, **finetuning.summary_metadata}


def pixels_of(figure, colour):
    image = figure_to_image(figure)
    return (np.abs(image.transpose(1, 2, 0).astype(int) - colour) < 8).all(axis=2)


def test_bars_grow_with_accuracy_and_stand_in_order_of_training_images():
    counts = np.array([5, 500, 50])
    blue, orange, red = (76, 114, 176), (221, 132, 82), (196, 78, 82)
    figures = {}
    for right in (20, 80):
        confusion = np.full((3, 3), 5)
        np.fill_diagonal(confusion, (right, 60, 60))
        figures[right] = accuracy_bars(confusion, counts, (100, 10), ["rare", "common", "middling"])
    areas = {right: [pixels_of(figure, colour)[60:].sum() for colour in (blue, orange, red)]
             for right, figure in figures.items()}
    assert areas[80][2] / areas[20][2] == pytest.approx((80 / 90) / (20 / 30), rel=0.1)
    assert areas[80][:2] == areas[20][:2]
    columns = [pixels_of(figures[80], colour)[60:].any(axis=0).nonzero()[0].mean() for colour in (blue, orange, red)]
    assert columns == sorted(columns)


def test_heatmap_has_rows_and_columns_in_order_of_training_images():
    counts, darkest = [5, 500, 50], (8, 48, 107)
    perfect, confused = (confusion_heatmap(9 * np.array(rows), counts, list("abc")) for rows in (
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0], [0, 0, 1]]))
    dark = pixels_of(perfect, darkest)[:, :480]  # without the colour bar
    assert np.corrcoef(dark.nonzero())[0, 1] > 0.8  # the diagonal, downwards
    rows, columns = (pixels_of(confused, darkest)[:, :480] & ~dark).nonzero()  # the rarest, taken for the commonest
    assert rows.min() > 250 and columns.max() < 240


def test_class_balanced_takes_as_many_of_each_class():
    targets = torch.tensor([0, 0, 0, 1, 2, 2, 1, 0, 2])
    chosen = class_balanced(targets, 7)
    assert targets[chosen].bincount().tolist() == [2, 2, 2]
    assert chosen.tolist() == sorted(chosen.tolist())
