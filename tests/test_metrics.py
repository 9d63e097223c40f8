import math

import numpy as np
import pytest
import torch
from timm.utils import accuracy

from util.metrics import classification_metrics, confusion_matrix, shot_groups

# three classes with 600, 300 and 100 training images; of their test images 2 of 2, 1 of 3 and 0 of 1 are right
LOGITS = torch.tensor([[2., 0., 0.], [5., 1., 0.], [0., 3., 1.], [4., 0., 0.], [0., 0., 2.], [0., 1., 0.]])
TARGETS = torch.tensor([0, 0, 1, 1, 1, 2])
COUNTS, THRESHOLDS = np.array([600, 300, 100]), (500, 200)


def test_hand_computed_figures():
    metrics = classification_metrics(LOGITS, TARGETS, COUNTS, THRESHOLDS)
    assert metrics["acc1"] == pytest.approx(50) and metrics["acc5"] == pytest.approx(100)
    assert (metrics["many"], metrics["medium"], metrics["few"]) == pytest.approx((1, 1 / 3, 0))
    assert metrics["per_class"] == pytest.approx([1, 1 / 3, 0])
    log_likelihoods = [math.log(math.exp(row[target]) / sum(map(math.exp, row)))
                       for row, target in zip(LOGITS.tolist(), TARGETS.tolist())]
    assert metrics["loss"] == pytest.approx(-sum(log_likelihoods) / 6, abs=1e-6)
    for name in ("acc1", "acc5", "loss", "many", "medium", "few"):
        assert type(metrics[name]) is float
    assert all(type(fraction) is float for fraction in metrics["per_class"])


def test_groups_are_weighted_by_test_images():
    metrics = classification_metrics(LOGITS, TARGETS, [600, 600, 100], THRESHOLDS)
    assert metrics["many"] == pytest.approx(3 / 5)  # the mean of the two classes would be 2/3


def test_confusion_matrix_has_true_classes_in_rows():
    confusion = confusion_matrix(LOGITS, TARGETS)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[2, 0, 0], [1, 1, 1], [0, 1, 0]]


def test_shot_thresholds_are_exclusive():
    many, medium, few = shot_groups([501, 500, 200, 199], (500, 200))
    assert many.tolist() == [True, False, False, False]
    assert medium.tolist() == [False, True, True, False]
    assert few.tolist() == [False, False, False, True]


def test_empty_groups_and_absent_classes_have_no_figure():
    metrics = classification_metrics(LOGITS, TARGETS.clamp(max=1), [600, 600, 600], THRESHOLDS)
    assert metrics["medium"] is None and metrics["few"] is None and metrics["per_class"][2] is None


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_agrees_with_timm_and_with_counting(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(500, num_classes, generator=generator)
    targets = torch.randint(num_classes, (500,), generator=generator)
    counts = np.linspace(1000, 10, num_classes)
    metrics = classification_metrics(logits, targets, counts, THRESHOLDS)
    acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
    assert (metrics["acc1"], metrics["acc5"]) == pytest.approx((acc1.item(), acc5.item()), abs=1e-4)
    groups = {"many": lambda n: n > 500, "medium": lambda n: 200 <= n <= 500, "few": lambda n: n < 200}
    for name, belongs in groups.items():
        hits = [max(range(num_classes), key=row.__getitem__) == target
                for row, target in zip(logits.tolist(), targets.tolist()) if belongs(counts[target])]
        assert metrics[name] == (pytest.approx(sum(hits) / len(hits)) if hits else None)


def test_half_precision_logits_give_an_exact_loss():
    logits = torch.randn(4096, 10, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(4096) % 10
    expected = torch.logsumexp(logits.double(), 1).mean() - logits.double()[torch.arange(4096), targets].mean()
    metrics = classification_metrics(logits, targets, [100] * 10, THRESHOLDS)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("logits, targets, counts", [
    (LOGITS, TARGETS[:5], COUNTS), (LOGITS, TARGETS, COUNTS[:2]), (LOGITS[:0], TARGETS[:0], COUNTS)])
def test_shapes_that_disagree_are_refused(logits, targets, counts):
    with pytest.raises(ValueError, match="class_counts"):
        classification_metrics(logits, targets, counts, THRESHOLDS)
