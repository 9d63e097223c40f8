import json
import math

import numpy as np
import pytest
import torch
from timm.utils import accuracy

from util.knn import KNNClassifier
from util.logit_adjustment import LogitAdjustedLoss, adjust_logits, log_class_shares
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
                       for row, target in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True)]
    assert metrics["loss"] == pytest.approx(-sum(log_likelihoods) / 6, abs=1e-6)
    json.dumps(metrics)  # for log.txt


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
                for row, target in zip(logits.tolist(), targets.tolist(), strict=True) if belongs(counts[target])]
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


def test_adjusted_logits_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, -1.0, 5.0]])
    counts = [80, 16, 4, 0]  # shares 0.8, 0.16 and 0.04, and a class without images
    adjusted = adjust_logits(logits, counts)
    expected = [[2 - math.log(0.8), 1 - math.log(0.16), -math.log(0.04)],
                [-math.log(0.8), -math.log(0.16), -math.log(0.04)],
                [3 - math.log(0.8), 3 - math.log(0.16), -1 - math.log(0.04)]]
    np.testing.assert_allclose(adjusted[:, :3], expected, atol=1e-6)
    assert (adjusted[:, 3] == -torch.inf).all()
    # 2.223, 2.833 and 3.219: class 2; ties of logits go to the rarest class, 2, and of the second tie to class 1.
    assert adjusted.argmax(1).tolist() == [2, 2, 1]
    assert adjust_logits(logits, counts, tau=0.5).argmax(1).tolist() == [0, 2, 1]  # 2.112, 1.916, 1.609 at first
    assert torch.equal(adjust_logits(logits, counts, tau=0)[:, :3], logits[:, :3])
    assert (adjust_logits(logits, counts, tau=0)[:, 3] == -torch.inf).all(), "never predicted"


def test_counts_of_another_length_are_refused():
    with pytest.raises(ValueError, match="1 class_counts for 3 columns"):
        adjust_logits(torch.zeros(2, 3), [5])


def test_training_on_shifted_logits_and_predicting_on_adjusted_ones_undo_each_other():
    """Cross-entropy of logits plus log share is that of logits that adjustment gives back (Menon et al., eq. 10)."""
    logits, counts = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [70, 20, 10]
    torch.testing.assert_close(adjust_logits(logits + log_class_shares(counts), counts), logits)


def test_adjusted_loss_by_hand():
    logits, labels, counts = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2]), [80, 16, 4]
    odds = [[share * math.exp(logit) for share, logit in zip((0.8, 0.16, 0.04), row, strict=True)]
            for row in logits.tolist()]
    expected = -(math.log(odds[0][0] / sum(odds[0])) + math.log(odds[1][2] / sum(odds[1]))) / 2
    assert LogitAdjustedLoss(counts)(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def knn_by_loops(features, labels, queries, num_classes, k, temperature):
    votes = []
    for query in queries.tolist():
        similarities = []
        for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            norms = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in feature))
            similarities.append((dot / norms, label))
        vote = [0.0] * num_classes
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            vote[label] += math.exp((similarity - max(similarities)[0]) / temperature) / (labels == label).sum().item()
        votes.append(vote)
    return votes


@pytest.mark.parametrize("k", [1, 7, 200])
def test_knn_equals_loops(k):
    generator = torch.Generator().manual_seed(k)
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 2)  # no image of class 3
    features = torch.randn(40, 5, generator=generator) + torch.eye(5)[labels]
    queries = torch.randn(20, 5, generator=generator)
    votes = KNNClassifier(features, labels, 4, k=k)(queries)
    expected = knn_by_loops(features, labels, queries, 4, k, 0.1)
    np.testing.assert_allclose(votes, expected, rtol=1e-4)
    assert votes.argmax(1).tolist() == [max(range(4), key=vote.__getitem__) for vote in expected]


def test_knn_at_a_low_temperature_is_the_nearest_neighbour():
    features, labels = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    for temperature in (1e-2, 1e-3, 1e-6):
        votes = KNNClassifier(features, labels, 5, temperature=temperature)(features)
        assert votes.isfinite().all() and torch.equal(votes.argmax(1), labels)


def test_knn_votes_in_float32_under_autocast():
    features, labels = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    knn = KNNClassifier(features, labels, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn(features), KNNClassifier(features, labels, 5).float()(features))
        assert knn(features.bfloat16()).dtype == torch.float32
