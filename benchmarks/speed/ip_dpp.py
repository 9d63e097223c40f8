"""One draw of the IP-DPP k-DPP against DPPy's exact sampler, on the same kernel. Takes some minutes.

    python benchmarks/speed/ip_dpp.py

DPPy is given the finished N x N kernel, which is not timed. Its first draw takes an eigendecomposition, elementary
symmetric polynomials and Gram-Schmidt. Ours starts from log p. "finite": whether DPPy's polynomials are, and our
inclusion probabilities.
"""
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from dppy.finite_dpps import FiniteDPP

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.speed.timer import median_seconds  # noqa: E402
from util.ip_dpp import inclusion_probabilities, sample_k_dpp  # noqa: E402


def dppy(kernel, k):
    dpp = FiniteDPP("likelihood", L=kernel)
    dpp.sample_exact_k_dpp(size=k, random_state=np.random.RandomState(0))
    return dpp.E_poly  # its elementary symmetric polynomials


if __name__ == "__main__":
    print(f"{'N':>5} {'k':>4} {'DPPy':>10} {'ours':>10} {'times':>8}  finite: DPPy, ours")
    for n, k in ((500, 50), (2000, 50), (2000, 500), (5000, 500)):
        p = np.random.default_rng(0).beta(1, 0.2, n)  # mostly learnt: mean 0.83, many near 1
        log_p, kernel = np.log(p), np.outer(p, p) / n  # equation 16
        np.fill_diagonal(kernel, 1 - kernel.sum(axis=1) + kernel.diagonal())
        with warnings.catch_warnings(action="ignore"):  # DPPy's overflows, which the last column reports
            theirs = median_seconds(partial(dppy, kernel, k), 3, clock=time.perf_counter)
            finite = np.isfinite(dppy(kernel, k)).all(), np.isfinite(inclusion_probabilities(log_p, k)).all()
        draw = partial(sample_k_dpp, log_p, k, np.random.default_rng(0))
        mine = median_seconds(draw, 101, clock=time.perf_counter)
        print(f"{n:5} {k:4} {theirs:8.3f} s {mine * 1e3:7.2f} ms {theirs / mine:8.0f}  {finite[0]}, {finite[1]}",
              flush=True)
