"""Information-Preservable DPP: exact fixed-size DPP (k-DPP) sampling of one class's images, in O(N sqrt(k)) time.

For N images whose true labels the classifier gives the probabilities p_i, stage 2 draws Y with |Y| = k and probability
proportional to det(S_Y), where (Lin and Yuan, arXiv 2510.08836, equation 16, is the kernel with c = 1)

    S_ij = p_i p_j / (c N) for i != j,    S_ii = 1 - sum over j != i of S_ij,    c = 1 ("paper") or N ("published").

**Determinants.** S is a diagonal matrix, with entries 1 - p_i mean(p) / c, plus a matrix of rank one. Let
s = c - 1 + max(e) with e_i = 1 - p_i, computed as -expm1(log p_i), and

    d_i = (c - 1 + e_i + mean(e) p_i) / s,    w_i = p_i^2 / (N d_i).

These lose no digits when every p_i rounds to 1. The matrix determinant lemma gives

    det(S_Y) = s^(k-1) c^(-k)  prod over Y of d_i  (s + sum over Y of w_i).

Where all p_i = 1, the paper's kernel has s = 0. We then take the limit of equal e_i -> 0, in which Y is uniform.

**Sampling.** Take the sum apart: give Y a mark m, which is one of its items (weight w_m) or none (weight s). For any
t > 0 let q_i = t d_i / (1 + t d_i). Draw the mark, item i with weight w_i q_i and none with weight s, put the marked
item into Y, and put every other item i into Y independently with probability q_i. The pair (Y, m) comes up with
probability proportional to t^|Y| w_m prod over Y of d_i (w_m = s for no mark), so that the first Y of size k is an
exact draw of the k-DPP: Hajek's rejective Poisson sampling (1964) with a mark. Any t gives exact draws; it only changes
how many tries are needed. With t such that sum q = k, a try succeeds with a probability of about 1 / sqrt(2 pi var),
where var = sum q (1 - q) < k. So a draw takes O(N sqrt(k)) expected time. Memory is O(N).

**Inclusion.** With the same q let r_i(z) = q_i z / (1 - q_i + q_i z), phi(z) = prod of (1 - q_i + q_i z),
R(z) = sum of w_i r_i(z), and [z^k] the coefficient of z^k. Then

    P(i in Y) = [z^k] phi r_i (s + R + w_i (1 - r_i))  /  [z^k] phi (s + R).

phi is the generating function of a sum of independent 0/1 variables with mean near k. So its coefficients are
probabilities, nothing overflows, and at most 54 points on the unit circle suffice, whatever N is.
"""

import numpy as np
import torch
import torch.nn.functional as F


def _check(log_p, k):
    """Check the arguments; return log_p as a float64 array."""
    log_p = np.asarray(log_p, dtype=np.float64)
    if log_p.ndim != 1 or not log_p.size:
        raise ValueError(f"log_p must have shape (N,) with N > 0, got {log_p.shape}")
    if not np.all(log_p <= 0):
        raise ValueError("log_p must hold log probabilities, at most 0 and not NaN")
    if not isinstance(k, (int, np.integer)) or not 0 <= k <= len(log_p):
        raise ValueError(f"k must be an integer from 0 to N = {len(log_p)}, got {k!r}")
    return log_p


def _diagonal_plus_rank_one(log_p, kernel):
    """(d, w, s) of the module's docstring; d and w have shape (N,)."""
    p, e = np.exp(log_p), -np.expm1(log_p)
    c = {"paper": 1, "published": len(p)}[kernel]
    s = c - 1 + e.max()
    d = (c - 1 + e) / s + np.mean(e / s) * p if s > 0 else np.ones_like(p)
    return d, p**2 / (len(p) * d), s


def _tilt(d, k):
    """t > 0 such that the q_i = t d_i / (1 + t d_i) sum to nearly k; needs 0 < k < N.

    It starts at a lower bound (Jensen). A step is exact where all d_i are equal and otherwise too short: t only rises.
    The kernels here take fewer than 10 steps. Any t keeps the results right, so the bound on the steps is safe.
    """
    n, t = len(d), k / ((len(d) - k) * d.mean())
    for _ in range(50):
        expected_size = np.sum(t * d / (1 + t * d))
        if abs(expected_size - k) < 0.1:
            break
        t *= k * (n - expected_size) / ((n - k) * expected_size)
    return t


def sample_k_dpp(log_p, k, rng, kernel="paper"):
    """One exact draw of the k-DPP with kernel S, in O(N sqrt(k)) expected time.

    Args:
        log_p: (N,) log probability of the true label, from a float64 log-softmax; at most 0, -inf allowed.
        k: size of the draw, 0 <= k <= N.
        rng: numpy.random.Generator.
        kernel: "paper" (division by N) or "published" (division by N^2, as in the authors' code).

    Returns:
        (k,) int64 indices, ascending.

    Raises:
        ValueError: naming the argument that is out of its range.
    """
    log_p = _check(log_p, k)
    n = len(log_p)
    if k in (0, n):
        return np.arange(k, dtype=np.int64)
    d, w, s = _diagonal_plus_rank_one(log_p, kernel)
    t = _tilt(d, k)
    q = t * d / (1 + t * d)
    mark_weights = np.cumsum(np.append(w * q, s))
    # A try succeeds with probability > 0.39 / (1 + sd) for any log_p, so this many fail with probability < 1e-30.
    for _ in range(int(200 * (1 + np.sqrt(np.sum(q * (1 - q)))))):
        mark = np.searchsorted(mark_weights, rng.random() * mark_weights[-1], side="right")
        drawn = rng.random(n) < q
        drawn[mark:mark + 1] = True  # an empty slice where no item is marked
        if np.count_nonzero(drawn) == k:
            return np.flatnonzero(drawn).astype(np.int64)
    raise RuntimeError("no draw of the requested size: rng does not deliver uniform numbers")


def inclusion_probabilities(log_p, k, kernel="paper"):
    """Exact P(i in Y) of the k-DPP: (N,) float64 in [0, 1], summing to k. Arguments and errors: `sample_k_dpp`.

    By the last formula of the module's docstring. The number of points is odd, since an even one could hit the pole of
    r_i at q_i = 1/2. It is large enough for an error below 1e-19, counting both the aliases k +- points and the angles
    that are left out (Bernstein's inequality; |phi| <= exp(-var (1 - cos))).
    """
    log_p = _check(log_p, k)
    n = len(log_p)
    if k in (0, n):
        return np.full(n, k / n)
    d, w, s = _diagonal_plus_rank_one(log_p, kernel)
    t = _tilt(d, k)
    q, not_q = t * d / (1 + t * d), 1 / (1 + t * d)
    var = np.sum(q * not_q)
    points = int(min(n, 10 * np.sqrt(var) + 60)) // 2 * 2 + 1
    angles = 2 * np.pi / points * np.arange(points // 2 + 1)
    total, with_item = 0.0, np.zeros(n)
    for angle in angles[var * (1 - np.cos(angles)) <= 45]:
        factors = 1 + q * np.expm1(1j * angle)
        r = q * np.exp(1j * angle) / factors
        marked = s + np.sum(w * r)
        # Angles other than 0 stand for their conjugates too.
        phi_over_zk = (1 if angle == 0 else 2) * np.prod(factors) * np.exp(-1j * k * angle)
        total += (phi_over_zk * marked).real
        with_item += (phi_over_zk * r * (marked + w * not_q / factors)).real
    return np.clip(with_item / total, 0, 1)


def true_label_log_probabilities(logits, labels):
    """log p of the true label, float64 (N,) in NumPy, of logits, float tensor (N, C), and labels, int64 (N,)."""
    return -F.cross_entropy(logits.double(), labels, reduction="none").cpu().numpy()


def draw_subset(log_p, targets, num_samples, seed, sampler="exact", kernel="paper"):
    """Cut every class of more than `num_samples` images to that number; the others stay whole (paper, section 5).

    Args:
        log_p: (N,) log probabilities of the true labels; unused for "uniform".
        targets: N integer labels.
        num_samples: images to keep of a class, at most.
        seed: (seed, redraw), two integers >= 0. Together with the class they determine its draw.
        sampler: "exact" (`sample_k_dpp`) or "uniform" (plain random undersampling).
        kernel: of the k-DPP.

    Returns:
        int64 tensor of indices, class by class, ascending within a class.

    Raises:
        ValueError: an unknown sampler; others as `sample_k_dpp`.
    """
    if sampler not in ("exact", "uniform"):
        raise ValueError(f"sampler must be exact or uniform, got {sampler!r}")
    targets, chosen, (seed, redraw) = np.asarray(targets), [], seed
    for c in np.unique(targets):
        members = np.flatnonzero(targets == c)
        if len(members) > num_samples:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(redraw, int(c))))
            if sampler == "exact":
                drawn = sample_k_dpp(log_p[members], num_samples, rng, kernel)
            else:
                drawn = rng.choice(len(members), size=num_samples, replace=False)
            members = members[np.sort(drawn)]
        chosen.append(members)
    return torch.from_numpy(np.concatenate(chosen))
