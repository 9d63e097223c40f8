"""Draw image/ipdpp_inclusion.png: the probability that an image is drawn, against the probability p of its true label.

    python benchmarks/plot_inclusion.py

A class of 5,000 images of which 500 are drawn, at three stages of training (p Beta-distributed, by its mean).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from util.ip_dpp import inclusion_probabilities  # noqa: E402

N, K = 5000, 500
STAGES = {"mean p = 0.50": (1, 1), "mean p = 0.90": (0.9, 0.1), "mean p = 0.99": (0.99, 0.01)}


def main():
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for label, (a, b) in STAGES.items():
        p = np.sort(rng.beta(a, b, N))
        log_p = np.log(np.maximum(p, np.finfo(float).tiny))
        axes.plot(p, inclusion_probabilities(log_p, K), label=f"paper's kernel, {label}")
        published, = axes.plot(p, inclusion_probabilities(log_p, K, "published"), "k--")
    published.set_label("published kernel, all three alike")
    axes.set(xlabel="p, probability of the true label", ylabel="probability of being drawn", ylim=(0, 1), xlim=(0, 1),
             title=f"IP-DPP, {K} of {N} images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "image" / "ipdpp_inclusion.png", dpi=150)


if __name__ == "__main__":
    main()
