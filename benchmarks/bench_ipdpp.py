"""One draw of the IP-DPP k-DPP: util/ip_dpp.py against DPPy's exact sampler, on the same kernel in the same process.

    python benchmarks/bench_ipdpp.py

DPPy is given the finished N x N kernel, which is not timed; its first draw is (eigendecomposition, elementary symmetric
polynomials, Gram-Schmidt), in a fresh FiniteDPP each time. Ours starts from log p each time. Times are medians. Memory
is the peak of what one call allocates (tracemalloc, in a run apart from the timed ones), without DPPy's kernel.
"finite" says whether DPPy's polynomials and our inclusion probabilities are. Takes some four minutes on two idle cores.
"""

import resource
import sys
import time
import tracemalloc
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from dppy.finite_dpps import FiniteDPP

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.ip_dpp import inclusion_probabilities, likelihood_kernel, sample_k_dpp  # noqa: E402


def classifier_log_p(n):
    """A class that is mostly learnt: p of mean 0.83, many near 1."""
    return np.log(np.random.default_rng(0).beta(1, 0.2, n))


def seconds(function, runs):
    times = []
    for seed in range(runs):
        begin = time.perf_counter()
        function(seed)
        times.append(time.perf_counter() - begin)
    return median(times)


def peak_mib(function):
    tracemalloc.start()
    function(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def ours(log_p, k, seed):
    sample_k_dpp(log_p, k, np.random.default_rng(seed))


def inclusion(log_p, k, _seed):
    inclusion_probabilities(log_p, k)


def dppy(kernel, k, seed):
    """DPPy's exact draw; returns its elementary symmetric polynomials."""
    dpp = FiniteDPP("likelihood", L=kernel)
    dpp.sample_exact_k_dpp(size=k, random_state=np.random.RandomState(seed))
    return dpp.E_poly


def growth():
    print("Ours as N grows, k = 500 (process: peak resident memory so far, in all)")
    print(f"{'N':>9} {'draw':>11} {'inclusion':>11} {'draw':>10} {'inclusion':>10} {'process':>9}  finite")
    for n in (1_000, 10_000, 100_000, 1_000_000):
        log_p, k = classifier_log_p(n), 500
        times, peaks = [], []
        for function in (partial(ours, log_p, k), partial(inclusion, log_p, k)):
            times.append(seconds(function, 21))
            peaks.append(peak_mib(function))
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        finite = np.isfinite(inclusion_probabilities(log_p, k)).all()
        print(f"{n:>9} {times[0] * 1e3:>8.2f} ms {times[1] * 1e3:>8.2f} ms {peaks[0]:>6.1f} MiB {peaks[1]:>6.1f} MiB"
              f" {process:>5.0f} MiB  {finite}", flush=True)


def against_dppy():
    print("\nAgainst DPPy's exact k-DPP, first draw (at N = k both have no choice)")
    print(f"{'N':>5} {'k':>4} {'DPPy':>10} {'ours':>10} {'ratio':>8} {'DPPy':>12} {'ours':>10}  finite: DPPy, ours")
    for n, k in product((500, 2000, 5000), (50, 500)):
        log_p = classifier_log_p(n)
        kernel = likelihood_kernel(log_p)
        theirs_at, ours_at = partial(dppy, kernel, k), partial(ours, log_p, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # DPPy's overflows, reported in the last column
            theirs = seconds(theirs_at, 3)
            their_peak = peak_mib(theirs_at)
            polynomials = theirs_at(0)
        mine = seconds(ours_at, 101)
        finite = np.isfinite(polynomials).all(), np.isfinite(inclusion_probabilities(log_p, k)).all()
        print(f"{n:>5} {k:>4} {theirs:>8.3f} s {mine * 1e3:>7.2f} ms {theirs / mine:>8.0f} {their_peak:>8.1f} MiB"
              f" {peak_mib(ours_at):>6.2f} MiB  {finite[0]}, {finite[1]}", flush=True)


if __name__ == "__main__":
    growth()
    against_dppy()
