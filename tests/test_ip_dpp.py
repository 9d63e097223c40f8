"""IP-DPP against brute force (determinants of all submatrices of equation 16) and against DPPy."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from dppy.finite_dpps import FiniteDPP
from scipy.stats import chisquare

from util.ip_dpp import (
    KERNELS,
    SAMPLERS,
    draw_subset,
    exchange_chain,
    inclusion_probabilities,
    likelihood_kernel,
    sample_k_dpp,
    true_label_log_probabilities,
)

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
    """S entry by entry, as equation 16 writes it, with its N or the published code's N^2."""
    p = np.exp(log_p)
    n = len(p)
    divisor = {"paper": n, "published": n**2}[kernel]
    return np.array([[1 - sum(p[m] * p[i] for m in range(n) if m != i) / divisor if i == j else p[i] * p[j] / divisor
                      for j in range(n)] for i in range(n)])


def brute_force(log_p, k, kernel):
    """All subsets of size k, (subsets, k), and the determinant of each."""
    matrix = kernel_by_hand(log_p, kernel)
    subsets = np.array(list(combinations(range(len(log_p)), k)))
    return subsets, np.array([np.linalg.det(matrix[np.ix_(y, y)]) for y in subsets])


def frequencies(samples, n):
    return np.bincount(np.concatenate(samples), minlength=n) / len(samples)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n, k", [(1, 1), (2, 1), (7, 1), (8, 3), (9, 8), (9, 9), (12, 5)])
def test_inclusion_equals_brute_force(regime, kernel, n, k):
    log_p = REGIMES[regime](np.random.default_rng(n + k), n)
    subsets, determinants = brute_force(log_p, k, kernel)
    inclusion = [determinants[(subsets == i).any(axis=1)].sum() / determinants.sum() for i in range(n)]
    np.testing.assert_allclose(inclusion_probabilities(log_p, k, kernel), inclusion, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime, n, k", [("random", 8, 4), ("near 1", 8, 3), ("mixed", 10, 9), ("one wrong", 6, 2)])
def test_sampler_draws_each_subset_as_often_as_its_determinant_says(regime, kernel, n, k):
    log_p = REGIMES[regime](np.random.default_rng(0), n)
    subsets, determinants = brute_force(log_p, k, kernel)
    rng = np.random.default_rng(1)
    code = {tuple(y): number for number, y in enumerate(subsets.tolist())}
    draws = 20_000
    observed = np.bincount([code[tuple(sample_k_dpp(log_p, k, rng, kernel).tolist())] for _ in range(draws)],
                           minlength=len(subsets))
    expected = draws * determinants / determinants.sum()
    order = np.argsort(expected)
    rare = max(2, int(np.searchsorted(np.cumsum(expected[order]), 5)) + 1)  # pooled: chi-square needs counts above 5
    observed, expected = (np.append(c[order][rare:], c[order][:rare].sum()) for c in (observed, expected))
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.slow
def test_sampler_agrees_with_dppy():
    n, k, draws = 200, 20, 2000
    log_p = np.log(np.random.default_rng(0).beta(1, 0.2, n))
    dppy = FiniteDPP("likelihood", L=likelihood_kernel(log_p))
    legacy, rng = np.random.RandomState(0), np.random.default_rng(0)
    theirs = frequencies([dppy.sample_exact_k_dpp(size=k, random_state=legacy) for _ in range(draws)], n)
    ours = frequencies([sample_k_dpp(log_p, k, rng) for _ in range(draws)], n)
    inclusion = inclusion_probabilities(log_p, k)
    deviation = np.sqrt(inclusion * (1 - inclusion) / draws)
    assert np.abs(theirs - inclusion).max() < 4.5 * deviation.max()
    assert np.mean(((theirs - inclusion) / deviation) ** 2) < 1.4
    assert np.mean(((ours - theirs) / deviation) ** 2 / 2) < 1.4
    assert np.ptp(inclusion) > 10 * deviation.max()  # or uniform draws would pass too


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
def test_likelihood_kernel_equals_the_formula(regime, kernel):
    log_p = REGIMES[regime](np.random.default_rng(0), 40)
    matrix = likelihood_kernel(log_p, kernel)
    np.testing.assert_allclose(matrix, kernel_by_hand(log_p, kernel), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > -1e-14


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_class(kernel):
    n, k, draws = 5000, 500, 2000
    log_p = np.log(np.random.default_rng(0).beta(2, 0.2, n))
    inclusion = inclusion_probabilities(log_p, k, kernel)
    rng = np.random.default_rng(1)
    observed = frequencies([sample_k_dpp(log_p, k, rng, kernel) for _ in range(draws)], n)
    assert abs(inclusion.sum() - k) < 1e-6
    # n terms of mean close to 1 and variance close to 2
    assert abs(np.mean((observed - inclusion) ** 2 / (inclusion * (1 - inclusion) / draws)) - 1) < 5 * np.sqrt(2 / n)
    assert (np.ptp(inclusion) > 0.3) == (kernel == "paper")


@pytest.mark.parametrize("scale", [1e-12, 1e-200, 1e-310])
def test_digits_survive_when_every_p_rounds_to_one(scale):
    """As e -> 0 the law tends to that of prod d (sum 1 / d), d = e + mean(e), whatever the scale of e."""
    n, k = 5000, 500
    e = np.random.default_rng(0).random(n)
    inclusion = inclusion_probabilities(-scale * e, k)
    assert np.isfinite(inclusion).all() and np.ptp(inclusion) > 0.05
    np.testing.assert_allclose(inclusion, inclusion_probabilities(-1e-9 * e, k), rtol=1e-6)
    drawn = sample_k_dpp(-scale * e, k, np.random.default_rng(0))
    assert len(np.unique(drawn)) == k

    d = e[:8] + e[:8].mean()
    subsets = np.array(list(combinations(range(8), 3)))
    weights = np.prod(d[subsets], axis=1) * np.sum(1 / d[subsets], axis=1)
    limit = [weights[(subsets == i).any(axis=1)].sum() / weights.sum() for i in range(8)]
    np.testing.assert_allclose(inclusion_probabilities(-scale * e[:8], 3), limit, rtol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_p_equal_to_one_is_uniform(kernel):
    log_p, rng = np.zeros(6), np.random.default_rng(0)
    np.testing.assert_allclose(inclusion_probabilities(log_p, 2, kernel), np.full(6, 1 / 3), rtol=1e-12)
    pairs = [tuple(sample_k_dpp(log_p, 2, rng, kernel).tolist()) for _ in range(6000)]
    observed = [pairs.count(pair) for pair in combinations(range(6), 2)]
    assert chisquare(observed).pvalue > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("function", [sample_k_dpp, exchange_chain])
@pytest.mark.parametrize("log_p", [[0.0], [-np.inf], [0.0, 0.0, 0.0, 0.0], [-np.inf, -1.0, -1e-9, 0.0]])
def test_nothing_and_everything_can_be_drawn(function, kernel, log_p):
    for k in (0, len(log_p)):
        drawn = function(log_p, k, np.random.default_rng(0), kernel)
        assert drawn.dtype == np.int64 and sorted(drawn.tolist()) == list(range(k))
        np.testing.assert_array_equal(inclusion_probabilities(log_p, k, kernel), np.full(len(log_p), float(k > 0)))


def test_hard_classes_are_drawn_at_every_size():
    """One item or k items against all others is where independent trials could miss the size k most often."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 50, 1000):
        for k in {1, 2, n // 2, n - 1} - {n}:
            for wrong in {1, k, n - 1}:
                for p_right in (0.0, -1e-15, -0.5):
                    log_p = np.where(np.arange(n) < wrong, -np.inf, p_right)
                    for kernel in KERNELS:
                        assert len(np.unique(sample_k_dpp(log_p, k, rng, kernel))) == k
                        assert np.isclose(inclusion_probabilities(log_p, k, kernel).sum(), k, rtol=1e-9)


def test_uniform_ignores_the_classifier():
    log_p = np.array([-np.inf, -1e-6, -1e-6, -1e-6, -1e-6])
    pairs = [tuple(draw_subset(log_p, [0] * 5, 2, (0, redraw), "uniform").tolist()) for redraw in range(5000)]
    assert chisquare([pairs.count(pair) for pair in combinations(range(5), 2)]).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_mcmc_reaches_the_k_dpp(kernel):
    log_p, rng, draws = np.log([0.02, 0.3, 0.99, 0.99, 0.99, 0.99]), np.random.default_rng(0), 3000
    subsets, determinants = brute_force(log_p, 2, kernel)
    drawn = [tuple(sorted(exchange_chain(log_p, 2, rng, kernel, steps=40).tolist())) for _ in range(draws)]
    observed = [drawn.count(tuple(y)) for y in subsets.tolist()]
    assert chisquare(observed, draws * determinants / determinants.sum()).pvalue > 1e-3


def test_mcmc_moves_where_determinants_underflow():
    """det(S_Y) is about 1e-360 here: unscaled, DPPy finds no start and divides 0 by 0."""
    log_p = np.log1p(-1e-6 * np.random.default_rng(0).random(120))
    start, drawn = (exchange_chain(log_p, 60, np.random.default_rng(0), steps=steps) for steps in (1, 300))
    assert len(np.setdiff1d(drawn, start)) > 15


@pytest.mark.parametrize("log_p, k, kernel", [([-1.0, np.nan], 1, "paper"), ([-1.0, 1e-9], 1, "paper"),
                                              ([-1.0, -2.0], 3, "paper"), ([-1.0, -2.0], 1, "gaussian")])
def test_what_are_no_log_probabilities_sizes_or_kernels_is_refused(log_p, k, kernel):
    rng = np.random.default_rng(0)
    for call in (lambda: sample_k_dpp(log_p, k, rng, kernel), lambda: exchange_chain(log_p, k, rng, kernel),
                 lambda: inclusion_probabilities(log_p, k, kernel)):
        with pytest.raises(ValueError):
            call()


# --------------------------------------------------------------------------------------- subsets of all classes


def test_log_probabilities_keep_the_digits_of_confident_predictions():
    logits, labels = torch.tensor([[30.0, 0.0], [1.0, 3.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    expected = [-math.log1p(math.exp(-30)), -math.log1p(math.exp(2)), -math.log(2)]
    log_p = true_label_log_probabilities(logits, labels)
    assert log_p.dtype == np.float64 and log_p.tolist() == pytest.approx(expected, rel=1e-2, abs=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_large_classes_are_cut_and_the_others_stay_whole(sampler):
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [40, 10, 11, 3]))
    log_p = np.log(np.random.default_rng(1).random(64))
    subset = draw_subset(log_p, targets.tolist(), 10, (0, 0), sampler, "paper", 50)
    assert subset.dtype == torch.int64
    drawn = subset.numpy()
    parts = [drawn[targets[drawn] == c] for c in range(4)]
    assert [len(part) for part in parts] == [10, 10, 10, 3]
    np.testing.assert_array_equal(drawn, np.concatenate([np.unique(part) for part in parts]))  # ascending, distinct


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seed_redraw_and_class_alone_determine_a_draw(sampler):
    log_p = np.tile(np.log(np.random.default_rng(1).random(40)), 2)
    targets = np.repeat([0, 1], 40)

    def drawn(*seed, classes=(0, 1)):
        rows = np.isin(targets, classes)
        subset = draw_subset(log_p[rows], targets[rows], 10, seed, sampler, "paper", 50)
        return np.flatnonzero(rows)[subset].tolist()

    first = drawn(3, 4)
    assert drawn(3, 4) == first and drawn(3, 4, classes=[1]) == first[10:]  # nor does a class before it matter
    others = [drawn(3, 5), drawn(4, 4), drawn(4, 3)]
    draws = [tuple(np.sort(part) % 40) for subset in (first, *others) for part in (subset[:10], subset[10:])]
    assert len(set(draws)) == 8  # each class its own
