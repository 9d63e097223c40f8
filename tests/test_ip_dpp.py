"""IP-DPP against brute force (determinants of all submatrices of equation 16) and against DPPy."""
import math
from functools import partial
from itertools import combinations, count, product, repeat

import numpy as np
import pytest
import torch
from dppy.finite_dpps import FiniteDPP
from scipy.stats import chisquare

from util.ip_dpp import draw_subset, inclusion_probabilities, sample_k_dpp, true_label_log_probabilities

KERNELS = ("paper", "published")
ALL_PAIRS = np.array(list(combinations(range(6), 2)))
REGIMES = {
    "random": lambda rng, n: np.log(rng.random(n)),
    "near 0": lambda rng, n: -50 * rng.random(n) - 5,
    "near 1": lambda rng, n: np.log1p(-0.01 * rng.random(n)),
    "mixed": lambda rng, n: np.log(np.where(rng.random(n) < 0.5, 1 - 1e-3 * rng.random(n), 0.1 * rng.random(n))),
    "equal": lambda rng, n: np.full(n, np.log(0.7)),
    "one wrong": lambda rng, n: np.where(np.arange(n) == 1, -np.inf, np.log(0.999)),
    "zeros and ones": lambda rng, n: np.where(np.arange(n) % 3 == 0, -np.inf, 0.0),
}


def kernel_by_hand(log_p, kernel):
    """S as equation 16 writes it, with its N or the published code's N^2."""
    p = np.exp(log_p)
    matrix = np.outer(p, p) / {"paper": len(p), "published": len(p) ** 2}[kernel]
    np.fill_diagonal(matrix, 0)
    return matrix + np.diag(1 - matrix.sum(axis=1))


def brute_force(log_p, k, kernel):
    """All subsets of size k, (subsets, k), the determinant of each, and P(i in Y)."""
    matrix = kernel_by_hand(log_p, kernel)
    subsets = np.array(list(combinations(range(len(log_p)), k)))
    determinants = np.array([np.linalg.det(matrix[np.ix_(y, y)]) for y in subsets])
    inclusion = [determinants[(subsets == i).any(axis=1)].sum() / determinants.sum() for i in range(len(log_p))]
    return subsets, determinants, np.array(inclusion)


def assert_proportional(draw, subsets, weights, draws):
    """That draw() gives each of the subsets as often as its weight says, by a chi-square test."""
    code = {tuple(y): number for number, y in enumerate(subsets.tolist())}
    drawn = [code[tuple(sorted(draw().tolist()))] for _ in range(draws)]
    observed, expected = np.bincount(drawn, minlength=len(subsets)), draws * weights / weights.sum()
    order = np.argsort(expected)
    rare = max(2, int(np.searchsorted(np.cumsum(expected[order]), 5)) + 1)  # pooled: chi-square needs counts above 5
    observed, expected = (np.append(c[order][rare:], c[order][:rare].sum()) for c in (observed, expected))
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n, k", [(1, 1), (2, 1), (7, 1), (8, 3), (9, 8), (9, 9), (12, 5)])
def test_inclusion_equals_brute_force(regime, kernel, n, k):
    log_p = REGIMES[regime](np.random.default_rng(n + k), n)
    _, _, expected = brute_force(log_p, k, kernel)
    np.testing.assert_allclose(inclusion_probabilities(log_p, k, kernel), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime, n, k", [("random", 8, 4), ("near 1", 8, 3), ("mixed", 10, 9), ("one wrong", 6, 2)])
def test_sampler_draws_each_subset_as_often_as_its_determinant_says(regime, kernel, n, k):
    log_p, rng = REGIMES[regime](np.random.default_rng(0), n), np.random.default_rng(1)
    subsets, determinants, _ = brute_force(log_p, k, kernel)
    assert_proportional(partial(sample_k_dpp, log_p, k, rng, kernel), subsets, determinants, draws=20_000)


def spread(samples, inclusion):
    """Mean square of what separates the frequencies of n items from P(i in Y), in standard deviations: about 1."""
    observed = np.bincount(np.concatenate(samples), minlength=len(inclusion)) / len(samples)
    return np.mean((observed - inclusion) ** 2 / (inclusion * (1 - inclusion) / len(samples)))


@pytest.mark.slow
def test_inclusion_agrees_with_dppy():
    log_p = np.log(np.random.default_rng(0).beta(1, 0.2, 200))
    dppy, legacy = FiniteDPP("likelihood", L=kernel_by_hand(log_p, "paper")), np.random.RandomState(0)
    inclusion = inclusion_probabilities(log_p, 20)
    samples = [dppy.sample_exact_k_dpp(size=20, random_state=legacy) for _ in range(2000)]
    assert spread(samples, inclusion) < 1.4
    assert spread(samples, np.full(200, 0.1)) > 3  # or uniform probabilities would pass too


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_class(kernel):
    log_p, rng = np.log(np.random.default_rng(0).beta(2, 0.2, 5000)), np.random.default_rng(1)
    inclusion = inclusion_probabilities(log_p, 500, kernel)
    samples = [sample_k_dpp(log_p, 500, rng, kernel) for _ in range(2000)]
    assert abs(inclusion.sum() - 500) < 1e-6
    assert abs(spread(samples, inclusion) - 1) < 5 * np.sqrt(2 / 5000)  # 5000 terms of variance about 2
    assert (np.ptp(inclusion) > 0.3) == (kernel == "paper")


@pytest.mark.parametrize("scale", [1e-12, 1e-200, 1e-310])
def test_digits_survive_when_every_p_rounds_to_one(scale):
    """As e -> 0 the law tends to that of prod d (sum 1 / d), d = e + mean(e), whatever the scale of e."""
    e = np.random.default_rng(0).random(5000)
    inclusion, expected = (inclusion_probabilities(-factor * e, 500) for factor in (scale, 1e-9))
    np.testing.assert_allclose(inclusion, expected, rtol=1e-6)
    assert len(np.unique(sample_k_dpp(-scale * e, 500, np.random.default_rng(0)))) == 500
    d = e[:8] + e[:8].mean()
    subsets = np.array(list(combinations(range(8), 3)))
    weights = np.prod(d[subsets], axis=1) * np.sum(1 / d[subsets], axis=1)
    limit = [weights[(subsets == i).any(axis=1)].sum() / weights.sum() for i in range(8)]
    np.testing.assert_allclose(inclusion_probabilities(-scale * e[:8], 3), limit, rtol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_p_equal_to_one_is_uniform(kernel):
    log_p, rng = np.zeros(6), np.random.default_rng(0)
    np.testing.assert_allclose(inclusion_probabilities(log_p, 2, kernel), np.full(6, 1 / 3), rtol=1e-12)
    assert_proportional(partial(sample_k_dpp, log_p, 2, rng, kernel), ALL_PAIRS, np.ones(15), draws=6000)


def test_uniform_ignores_the_classifier():
    log_p, redraws = np.array([-np.inf] + [-1e-6] * 5), zip(repeat(0), count())
    draw = lambda: draw_subset(log_p, [0] * 6, 2, next(redraws), "uniform")
    assert_proportional(draw, ALL_PAIRS, np.ones(15), draws=6000)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("log_p", [[0.0], [-np.inf], [0.0, 0.0, 0.0, 0.0], [-np.inf, -1.0, -1e-9, 0.0]])
def test_nothing_and_everything_can_be_drawn(kernel, log_p):
    for k in (0, len(log_p)):
        drawn = sample_k_dpp(log_p, k, np.random.default_rng(0), kernel)
        assert drawn.dtype == np.int64 and sorted(drawn.tolist()) == list(range(k))
        np.testing.assert_array_equal(inclusion_probabilities(log_p, k, kernel), np.full(len(log_p), float(k > 0)))


def test_hard_classes_are_drawn_at_every_size():
    """One item or k items against all others is where independent trials could miss the size k most often."""
    rng = np.random.default_rng(0)
    for n, p_right, kernel in product((2, 3, 50, 1000), (0.0, -1e-15, -0.5), KERNELS):
        for k in {1, 2, n // 2, n - 1} - {n}:
            for wrong in {1, k, n - 1}:
                log_p = np.where(np.arange(n) < wrong, -np.inf, p_right)
                assert len(np.unique(sample_k_dpp(log_p, k, rng, kernel))) == k
                assert np.isclose(inclusion_probabilities(log_p, k, kernel).sum(), k, rtol=1e-9)


@pytest.mark.parametrize("log_p, k", [([-1.0, np.nan], 1), ([-1.0, 1e-9], 1), ([-1.0], 2)])
def test_what_are_no_log_probabilities_or_sizes_is_refused(log_p, k):
    with pytest.raises(ValueError):
        sample_k_dpp(log_p, k, np.random.default_rng(0))


def test_log_probabilities_keep_the_digits_of_confident_predictions():
    logits, labels = torch.tensor([[30.0, 0.0], [1.0, 3.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    expected = [-math.log1p(math.exp(-30)), -math.log1p(math.exp(2)), -math.log(2)]
    log_p = true_label_log_probabilities(logits, labels)
    assert log_p.dtype == np.float64 and log_p.tolist() == pytest.approx(expected, rel=1e-2, abs=0)


@pytest.mark.parametrize("sampler", ["exact", "uniform"])
def test_large_classes_are_cut_and_the_others_stay_whole(sampler):
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [40, 10, 11, 3]))
    log_p = np.log(np.random.default_rng(1).random(64))
    drawn = draw_subset(log_p, targets.tolist(), 10, (0, 0), sampler)
    assert drawn.dtype == torch.int64 and np.bincount(targets[drawn]).tolist() == [10, 10, 10, 3]
    assert drawn.tolist() == sorted(set(drawn.tolist()), key=lambda image: (targets[image], image))


@pytest.mark.parametrize("sampler", ["exact", "uniform"])
def test_seed_redraw_and_class_alone_determine_a_draw(sampler):
    log_p, targets = np.log(np.random.default_rng(1).random(80)), np.repeat([0, 1], 40)

    def drawn(*seed, classes=(0, 1)):
        rows = np.isin(targets, classes)
        subset = draw_subset(log_p[rows], targets[rows], 10, seed, sampler)
        return np.flatnonzero(rows)[subset].tolist()

    first = drawn(3, 4)
    assert drawn(3, 4) == first and drawn(3, 4, classes=[1]) == first[10:]  # nor does a class before it matter
    others = [drawn(3, 5), drawn(4, 4), drawn(4, 3)]
    draws = [tuple(np.sort(part) % 40) for subset in (first, *others) for part in (subset[:10], subset[10:])]
    assert len(set(draws)) == 8  # each class its own
