"""The long-tailed subsets of CIFAR, and the toy data."""
import importlib
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from util.imbalanced_cifar import ImbalanceCIFAR10, ImbalanceCIFAR100, long_tailed_counts
from util.toy_data import ToyCIFAR

TOTALS = {(10, 100): 12406, (10, 10): 20431, (100, 100): 10847, (100, 10): 19573}  # by classes and factor


def kept_by_the_rule(labels, num_classes, factor):
    """Indices by the subset rule, written again with the global legacy generator and plain lists."""
    state = np.random.get_state()
    np.random.seed(0)
    kept = []
    for c in range(num_classes):
        indices = [i for i, label in enumerate(labels) if label == c]
        np.random.shuffle(indices)
        kept += indices[:int(len(labels) / num_classes * factor ** (-c / (num_classes - 1)) + 1e-9)]
    np.random.set_state(state)
    return kept


@pytest.fixture(params=[ImbalanceCIFAR10, ImbalanceCIFAR100])
def fake(request, tmp_path, monkeypatch):
    """A CIFAR of 12 random images a class, and 2 for testing, as (class, folder, (pixels, labels) of both)."""
    dataset, rng, splits = request.param, np.random.default_rng(0), []
    folder = tmp_path / "data" / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if dataset.num_classes == 10 else "fine_labels"
    for split, images in ("train_list", 12), ("test_list", 2):
        labels = rng.permutation(np.repeat(np.arange(dataset.num_classes), images))
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        splits.append((pixels, labels))
        names = [name for name, _ in getattr(dataset, split)]
        of_files = zip(names, np.split(pixels, len(names)), np.split(labels, len(names)), strict=True)
        for name, some_pixels, some_labels in of_files:
            (folder / name).write_bytes(pickle.dumps({"data": some_pixels, key: some_labels.tolist()}))
        monkeypatch.setattr(dataset, split, [(name, None) for name in names])  # None: without their sums
    meta = {"filename": dataset.meta["filename"], "key": "names", "md5": None}
    (folder / meta["filename"]).write_bytes(pickle.dumps({"names": [str(c) for c in range(dataset.num_classes)]}))
    monkeypatch.setattr(dataset, "meta", meta)
    monkeypatch.setattr(dataset, "n_max", 12)
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/")  # nobody listens there
    return dataset, tmp_path / "data", splits


@pytest.mark.parametrize("num_classes, n_max", [(10, 5000), (100, 500)])
@pytest.mark.parametrize("factor", [100, 10])
def test_counts(num_classes, n_max, factor):
    counts = long_tailed_counts(num_classes, n_max, factor)
    assert counts.dtype == np.int64 and counts.sum() == TOTALS[num_classes, factor]
    assert counts[0] == n_max and counts[-1] == n_max // factor and (np.diff(counts) <= 0).all()
    assert long_tailed_counts(10, 49, 49)[-1] == 1  # though 49 * (1 / 49) is less than 1


def test_fake_cifar_is_cut_by_the_rule_and_its_test_set_is_whole(fake):
    dataset, root, splits = fake
    before = np.random.get_state()[1].tolist()
    train, test = dataset(root, 4), dataset(root, 4, train=False)
    assert np.random.get_state()[1].tolist() == before
    kept = kept_by_the_rule(splits[0][1], dataset.num_classes, 4)
    assert len(set(kept)) == len(kept) < len(splits[0][1])
    for ours, (pixels, labels), chosen in zip((train, test), splits, (kept, slice(None)), strict=True):
        assert np.array_equal(ours.data.transpose(0, 3, 1, 2), pixels[chosen].reshape(-1, 3, 32, 32))
        assert ours.targets == labels[chosen].tolist()
        assert ours.class_counts.tolist() == [ours.targets.count(c) for c in range(dataset.num_classes)]


@pytest.mark.slow
@pytest.mark.parametrize("long_tailed, balanced", [(ImbalanceCIFAR10, CIFAR10), (ImbalanceCIFAR100, CIFAR100)])
def test_real_cifar(cifar_root, long_tailed, balanced):
    original, original_test = balanced(cifar_root), balanced(cifar_root, train=False)
    for factor in (100, 10):
        train = long_tailed(cifar_root, factor)
        kept = kept_by_the_rule(original.targets, train.num_classes, factor)
        assert len(train) == len(set(kept)) == TOTALS[train.num_classes, factor]
        assert np.array_equal(train.data, original.data[kept])
        assert train.targets == [original.targets[i] for i in kept]
    test = long_tailed(cifar_root, train=False)
    assert np.array_equal(test.data, original_test.data) and test.targets == original_test.targets


def test_shot_thresholds():
    assert (ImbalanceCIFAR10.shot_thresholds, ImbalanceCIFAR100.shot_thresholds) == ((500, 200), (100, 20))
    toy = ToyCIFAR(10)
    many_above, few_below = toy.shot_thresholds
    assert (toy.class_counts > many_above).sum() == 5 and (toy.class_counts < few_below).sum() == 3  # as of CIFAR-10


@pytest.mark.parametrize("stage", ["pretrain_bns", "lineprob_bns", "finetune_ipdpp"])
def test_scripts_train_on_the_images_that_root_and_factor_name(stage, fake, tmp_path, capsys):
    """All in one batch, which no other factor would fill."""
    dataset, root, _ = fake
    script = importlib.import_module(f"main_cifar{dataset.num_classes}_{stage}")
    images = sum(int(12 * 12 ** (-c / (dataset.num_classes - 1)) + 1e-9) for c in range(dataset.num_classes))
    flags = ["--data_root", root, "--imbalanced_factor", 12, "--batch_size", images, "--model", "test_resnet",
             "--input_size", 8, "--device", "cpu", "--amp", "none", "--epochs", 1, "--output_dir", tmp_path / "run"]
    if stage != "pretrain_bns":
        flags += ["--num_samples", 12]
    record, = script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))
    assert record["train_images"] == images
    assert stage == "pretrain_bns" or f" {2 * dataset.num_classes} test images" in capsys.readouterr().out
    assert (tmp_path / "run" / f"{stage}_cifar{dataset.num_classes}_if12.pth").exists()


@pytest.mark.parametrize("num_classes, n_max, n_min, n_test", [(10, 500, 5, 100), (100, 100, 1, 20)])
def test_toy_data(num_classes, n_max, n_min, n_test):
    train, test = ToyCIFAR(num_classes), ToyCIFAR(num_classes, train=False)
    assert np.array_equal(train.class_counts, long_tailed_counts(num_classes, n_max, 100))
    assert train.class_counts[-1] == n_min and (test.class_counts == n_test).all()
    for toy in (train, test):
        assert toy.data.shape == (len(toy), 32, 32, 3) and toy.data.dtype == np.uint8
        assert toy.targets == np.repeat(np.arange(num_classes), toy.class_counts).tolist()
    assert not {image.tobytes() for image in train.data} & {image.tobytes() for image in test.data}
    assert np.array_equal(train.data, ToyCIFAR(num_classes).data)  # no two runs differ
