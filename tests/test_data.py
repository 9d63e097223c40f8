import hashlib
import importlib
import pickle

import numpy as np
import pytest
from conftest import Payload
from torchvision.datasets import CIFAR10, CIFAR100

from util.errors import UserError
from util.imbalanced_cifar import ImbalanceCIFAR10, ImbalanceCIFAR100, long_tailed_counts, long_tailed_indices
from util.metrics import shot_groups
from util.toy_data import ToyCIFAR

BOTH = pytest.mark.parametrize("long_tailed, balanced", [(ImbalanceCIFAR10, CIFAR10), (ImbalanceCIFAR100, CIFAR100)])
TOTALS = {("cifar10", 100): 12406, ("cifar10", 10): 20431, ("cifar100", 100): 10847, ("cifar100", 10): 19573}


def kept_by_the_rule(labels, num_classes, factor):
    """The subset rule written again, with the global legacy generator and plain lists: {class: indices}."""
    state = np.random.get_state()
    np.random.seed(0)
    kept = {}
    for c in range(num_classes):
        indices = [i for i, label in enumerate(labels) if label == c]
        np.random.shuffle(indices)
        kept[c] = indices[:int(len(labels) / num_classes * factor ** (-c / (num_classes - 1)) + 1e-9)]
    np.random.set_state(state)
    return kept


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(params=[ImbalanceCIFAR10, ImbalanceCIFAR100])
def fake(request, tmp_path, monkeypatch):
    """A small CIFAR of random images in the original file format, as (class, root), in root/<base_folder>."""
    dataset, root, rng = request.param, tmp_path / "data", np.random.default_rng(0)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if dataset.num_classes == 10 else "fine_labels"
    per_file = {"train": 12 * dataset.num_classes // len(dataset.train_list), "test": 2 * dataset.num_classes}
    labels = {"train": rng.permutation(np.arange(12 * dataset.num_classes) % dataset.num_classes).tolist(),
              "test": (np.arange(2 * dataset.num_classes) % dataset.num_classes).tolist()}
    for split in ("train", "test"):
        files = []
        for i, (name, _) in enumerate(getattr(dataset, f"{split}_list")):
            pixels = rng.integers(0, 256, (per_file[split], 3072), dtype=np.uint8)
            part = labels[split][i * per_file[split]:(i + 1) * per_file[split]]
            (folder / name).write_bytes(pickle.dumps({"data": pixels, key: part}))
            files.append([name, md5(folder / name)])
        monkeypatch.setattr(dataset, f"{split}_list", files)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [str(c) for c in range(dataset.num_classes)]}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    monkeypatch.setattr(dataset, "n_max", 12)
    monkeypatch.setattr(dataset, "url", f"http://127.0.0.1:9/{dataset.filename}")  # nobody listens there
    return dataset, root


# The subset rule.

@pytest.mark.parametrize("name, factor", TOTALS)
def test_counts(name, factor):
    num_classes, n_max = {"cifar10": (10, 5000), "cifar100": (100, 500)}[name]
    counts = long_tailed_counts(num_classes, n_max, factor)
    assert counts.dtype == np.int64 and counts.sum() == TOTALS[name, factor]
    assert counts[0] == n_max and counts[-1] == n_max // factor and (np.diff(counts) <= 0).all()


def test_no_class_is_left_without_images():
    """Where n_max * (1 / factor) rounds to less than 1, as for 49."""
    for n_max in range(1, 2001):
        assert long_tailed_counts(10, n_max, n_max)[-1] == 1


@pytest.mark.parametrize("factor", [0.5, 0, -100, float("nan"), float("inf"), 5001])
def test_bad_factor_is_refused_before_any_file_is_sought(factor, tmp_path):
    with pytest.raises(UserError, match="--imbalanced_factor"):
        ImbalanceCIFAR10(tmp_path / "absent", factor)
    with pytest.raises(UserError, match="--imbalanced_factor"):
        ToyCIFAR(10, factor)


def test_indices_follow_the_rule_and_leave_the_global_generator_alone():
    labels = np.random.default_rng(1).permutation(np.arange(3000) % 10)
    before = np.random.get_state()[1].tolist()
    indices = long_tailed_indices(labels, long_tailed_counts(10, 300, 50))
    assert np.random.get_state()[1].tolist() == before
    assert indices.tolist() == sum(kept_by_the_rule(labels, 10, 50).values(), [])


def test_fake_cifar_is_cut_by_the_rule(fake):
    dataset, root = fake
    files = [pickle.loads((root / dataset.base_folder / name).read_bytes()) for name, _ in dataset.train_list]
    labels = sum((file.get("labels") or file.get("fine_labels") for file in files), [])
    pixels = np.concatenate([file["data"] for file in files]).reshape(-1, 3, 32, 32)
    train = dataset(root, 4)
    kept = sum(kept_by_the_rule(labels, dataset.num_classes, 4).values(), [])
    assert len(set(kept)) == len(kept) == len(train) < len(labels)
    assert train.targets == [labels[i] for i in kept] and all(type(target) is int for target in train.targets)
    assert np.array_equal(train.data.transpose(0, 3, 1, 2), pixels[kept]) and train.data.flags.c_contiguous
    assert train.class_counts.dtype == np.int64
    assert train.class_counts.tolist() == [train.targets.count(c) for c in range(dataset.num_classes)]


def test_fake_cifar_test_set_is_whole(fake):
    dataset, root = fake
    test = dataset(root, 4, train=False)
    assert test.data.shape == (2 * dataset.num_classes, 32, 32, 3) and (test.class_counts == 2).all()
    assert test.targets == [i % dataset.num_classes for i in range(len(test))]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("factor", [100, 10])
def test_real_cifar(cifar_root, long_tailed, balanced, factor):
    original, train = balanced(cifar_root), long_tailed(cifar_root, factor)
    kept = sum(kept_by_the_rule(original.targets, train.num_classes, factor).values(), [])
    assert len(train) == len(set(kept)) == TOTALS[f"cifar{train.num_classes}", factor]
    assert np.array_equal(train.data, original.data[kept]) and train.targets == [original.targets[i] for i in kept]


@BOTH
def test_real_cifar_test_set(cifar_root, long_tailed, balanced):
    original, test = balanced(cifar_root, train=False), long_tailed(cifar_root, train=False)
    assert np.array_equal(test.data, original.data) and test.targets == original.targets
    assert (test.class_counts == 10000 // test.num_classes).all() and test.classes == original.classes


def test_shot_groups():
    assert (ImbalanceCIFAR10.shot_thresholds, ImbalanceCIFAR100.shot_thresholds) == ((500, 200), (100, 20))
    toy = ToyCIFAR(10)
    for dataset, counts in [(ImbalanceCIFAR10, long_tailed_counts(10, 5000, 100)), (toy, toy.class_counts)]:
        groups = [np.flatnonzero(group).tolist() for group in shot_groups(counts, dataset.shot_thresholds)]
        assert groups == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize("stage", ["pretrain_bns", "lineprob_bns", "finetune_ipdpp"])
def test_scripts_train_on_the_images_that_root_and_factor_name(stage, fake, tmp_path):
    """All in one batch, which no other factor would fill."""
    dataset, root = fake
    script = importlib.import_module(f"main_cifar{dataset.num_classes}_{stage}")
    images = sum(int(12 * 12 ** (-c / (dataset.num_classes - 1)) + 1e-9) for c in range(dataset.num_classes))
    flags = ["--data_root", root, "--imbalanced_factor", 12, "--batch_size", images, "--model", "test_resnet",
             "--input_size", 8, "--device", "cpu", "--amp", "none", "--epochs", 1, "--output_dir", tmp_path / "run"]
    if stage != "pretrain_bns":
        flags += ["--num_samples", 12]
    record, = script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))
    assert record["train_images"] == images
    assert (tmp_path / "run" / f"{stage}_cifar{dataset.num_classes}_if12.pth").exists()


# Files that are absent, damaged or foreign.

def test_absent_or_foreign_files_are_refused_and_not_run(fake, tmp_path):
    dataset, root = fake
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        dataset(tmp_path / "elsewhere", 4)
    (root / dataset.base_folder / dataset.test_list[0][0]).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        dataset(root, 4)
    assert not (tmp_path / "ran").exists()


# Toy data.

@pytest.mark.parametrize("num_classes, n_max, n_min, n_test", [(10, 500, 5, 100), (100, 100, 1, 20)])
def test_toy_layout(num_classes, n_max, n_min, n_test):
    train, test = ToyCIFAR(num_classes), ToyCIFAR(num_classes, train=False)
    assert np.array_equal(train.class_counts, long_tailed_counts(num_classes, n_max, 100))
    assert train.class_counts[-1] == n_min and (test.class_counts == n_test).all()
    for toy in (train, test):
        assert toy.data.shape == (len(toy), 32, 32, 3) and toy.data.dtype == np.uint8
        assert toy.targets == np.repeat(np.arange(num_classes), toy.class_counts).tolist()
        assert type(toy.targets[0]) is int
        assert toy.class_counts.dtype == np.int64 and len(set(toy.classes)) == num_classes
    assert not {image.tobytes() for image in train.data} & {image.tobytes() for image in test.data}


def test_toy_is_deterministic():
    np.random.seed(3)
    first = ToyCIFAR(100, 10)
    np.random.seed(4)
    assert np.array_equal(first.data, ToyCIFAR(100, 10).data)
