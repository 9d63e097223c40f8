"""Figures of an evaluation, logit adjustment and nearest neighbours, by hand and by loops."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from util.knn import KNNClassifier
from util.logit_adjustment import LogitAdjustedLoss, adjust_logits
from util.metrics import classification_metrics

# Of the test images of four classes 2 of 2, 1 of 3, 1 of 1 and 0 of 1 are right.
LOGITS = torch.tensor([[2., 0., 0., 0.], [5., 1., 0., 1.], [0., 3., 1., 0.], [4., 0., 0., 0.], [0., 0., 2., 0.],
                       [0., 0., 4., 3.], [0., 1., 0., 0.]])
TARGETS = torch.tensor([0, 0, 1, 1, 1, 2, 3])
COUNTS, THRESHOLDS = [501, 500, 200, 199], (500, 200)  # training images; both thresholds are exclusive


def test_figures_by_hand():
    metrics = classification_metrics(LOGITS, TARGETS, COUNTS, THRESHOLDS)
    assert metrics["acc1"] == pytest.approx(400 / 7) and metrics["acc5"] == pytest.approx(100)
    # Weighted by test images: the mean of the two medium classes would be 2/3.
    assert (metrics["many"], metrics["medium"], metrics["few"]) == pytest.approx((1, 2 / 4, 0))
    assert metrics["per_class"] == pytest.approx([1, 1 / 3, 1, 0])
    log_likelihoods = [math.log(math.exp(row[target]) / sum(map(math.exp, row)))
                       for row, target in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True)]
    assert metrics["loss"] == pytest.approx(-sum(log_likelihoods) / 7, abs=1e-6)
    json.dumps(metrics)  # for log.txt


def test_empty_groups_and_absent_classes_have_no_figure():
    metrics = classification_metrics(LOGITS, TARGETS.clamp(max=1), [600] * 4, THRESHOLDS)
    assert metrics["medium"] is None and metrics["few"] is None and metrics["per_class"][2] is None


def test_five_guesses_are_the_five_largest_logits():
    logits, targets = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 10
    rank = (logits > logits[torch.arange(500), targets][:, None]).sum(1)
    metrics = classification_metrics(logits, targets, [100] * 10, THRESHOLDS)
    expected = [(rank < guesses).double().mean().item() * 100 for guesses in (1, 5)]
    assert [metrics["acc1"], metrics["acc5"]] == pytest.approx(expected)


def test_shapes_that_disagree_are_refused():
    for logits, targets, counts in (
            (LOGITS, TARGETS[:5], COUNTS), (LOGITS, TARGETS, COUNTS[:2]), (LOGITS[:0], TARGETS[:0], COUNTS)):
        with pytest.raises(ValueError):
            classification_metrics(logits, targets, counts, THRESHOLDS)
    with pytest.raises(ValueError):
        adjust_logits(LOGITS, [5])


def test_adjusted_logits_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, 9.0], [3.0, 3.0, -1.0, 5.0]])
    counts = [80, 16, 4, 0]  # shares 0.8, 0.16 and 0.04, and a class without images, which is never predicted
    for tau in (0.0, 0.5, 1.0):
        expected = [[2 - tau * math.log(0.8), 1 - tau * math.log(0.16), -tau * math.log(0.04), -math.inf],
                    [3 - tau * math.log(0.8), 3 - tau * math.log(0.16), -1 - tau * math.log(0.04), -math.inf]]
        np.testing.assert_allclose(adjust_logits(logits, counts, tau), expected, atol=1e-6)
    assert torch.equal(adjust_logits(logits, counts), adjust_logits(logits, counts, 1.0))


def test_adjusted_loss_by_hand():
    logits, labels, counts = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2]), [80, 16, 4]
    odds = [[share * math.exp(logit) for share, logit in zip((0.8, 0.16, 0.04), row, strict=True)]
            for row in logits.tolist()]
    expected = -(math.log(odds[0][0] / sum(odds[0])) + math.log(odds[1][2] / sum(odds[1]))) / 2
    assert LogitAdjustedLoss(counts)(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def knn_by_loops(features, labels, queries, num_classes, k=200, temperature=0.1):
    votes = np.zeros((len(queries), num_classes))
    for vote, query in zip(votes, queries.double(), strict=True):
        similarities = F.cosine_similarity(query, features.double()).tolist()
        ranking = sorted(zip(similarities, labels.tolist(), strict=True), reverse=True)
        for similarity, label in ranking[:k]:
            vote[label] += math.exp((similarity - ranking[0][0]) / temperature) / (labels == label).sum()
    return votes


# At a temperature of 0.005 the exponentials themselves would be infinite in float32.
@pytest.mark.parametrize("settings", [{}, {"k": 1}, {"k": 7}, {"k": 1000}, {"temperature": 0.005}])
def test_knn_equals_loops(settings):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 210 + [1] * 60 + [2] * 10)  # no image of class 3
    features = torch.randn(280, 5, generator=generator) + torch.eye(5)[labels]
    queries = torch.randn(20, 5, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # changes nothing
        votes = KNNClassifier(features, labels, 4, **settings)(queries)
    np.testing.assert_allclose(votes, knn_by_loops(features, labels, queries, 4, **settings), rtol=2e-4)
