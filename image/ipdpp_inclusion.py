"""Draw image/ipdpp_inclusion.png: the probability that an image is drawn, against the probability p of its true label.

    python image/ipdpp_inclusion.py

A class of 5,000 images of which 500 are drawn, at three stages of training (p Beta-distributed, by its mean).
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from util.ip_dpp import inclusion_probabilities  # noqa: E402

figure = Figure((6.4, 4), layout="constrained")
panel = figure.subplots()
rng = np.random.default_rng(0)
for label, a, b in ("mean p = 0.50", 1, 1), ("mean p = 0.90", 0.9, 0.1), ("mean p = 0.99", 0.99, 0.01):
    p = np.sort(rng.beta(a, b, 5000))
    log_p = np.log(np.maximum(p, np.finfo(float).tiny))
    panel.plot(p, inclusion_probabilities(log_p, 500), label=f"paper's kernel, {label}")
    published, = panel.plot(p, inclusion_probabilities(log_p, 500, "published"), "k--")
published.set_label("published kernel, all three alike")
panel.set(xlabel="p, probability of the true label", ylabel="probability of being drawn", ylim=(0, 1), xlim=(0, 1),
          title="IP-DPP, 500 of 5000 images")
panel.legend(frameon=False)
panel.spines[["top", "right"]].set_visible(False)
figure.savefig(ROOT / "image" / "ipdpp_inclusion.png", dpi=150)
