"""What the log and TensorBoard say of a draw of stage 2."""
import numpy as np
import torch

from util.ip_dpp import inclusion_probabilities, true_label_log_probabilities

SHOWN_CLASSES = 5  # largest classes whose draws are logged


def describe_draw(log, epoch, logits, train_set, subset, previous, kernel):
    """Show in TensorBoard which images of the largest classes were drawn.

    Args:
        log: RunLog.
        logits: of all training images, float (N, C), by the model that the draw was made with.
        subset: int64 tensor, the indices drawn now.
        previous: those drawn before, or None.
        kernel: of the k-DPP, for its inclusion probabilities; None where the draw was uniform.

    Returns:
        dict for log.txt: `drawn`, a list with one dict per class. A margin is the logit of the true label minus the
        largest other logit. It is below 0 where the classifier is wrong.
    """
    labels = train_set.labels
    log_p = true_label_log_probabilities(logits, labels)
    largest_other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margins = (logits.gather(1, labels[:, None])[:, 0] - largest_other).double().cpu().numpy()
    targets, subset = labels.cpu().numpy(), subset.numpy()
    record = []
    for c in np.argsort(-train_set.class_counts, kind="stable")[:SHOWN_CLASSES]:
        members = np.flatnonzero(targets == c)
        drawn, left = np.intersect1d(subset, members), np.setdiff1d(members, subset)
        if not len(left):
            continue
        figures = {"mean_p": float(np.exp(log_p[members]).mean())}
        for name, part in (("drawn", drawn), ("left", left)):
            figures[f"{name}_mean_p"] = float(np.exp(log_p[part]).mean())
            figures[f"{name}_margin"] = float(margins[part].mean())
        if previous is not None:
            figures["changed"] = len(np.setdiff1d(drawn, previous.numpy()))
        title = f"train_ipdpp/{train_set.classes[c]}"
        if kernel:
            inclusion = inclusion_probabilities(log_p[members], len(drawn), kernel)
            figures |= {"max_inclusion": float(inclusion.max()), "min_inclusion": float(inclusion.min())}
            ranked = torch.from_numpy(members[np.argsort(-inclusion, kind="stable")])
            extremes = torch.cat((ranked[:16], ranked[-16:])).to(train_set.images.device)
            log.images(f"{title}/most and least likely drawn", train_set.images[extremes].cpu(), epoch)
        log.scalars({f"{title}/{name}": value for name, value in figures.items()}, epoch)
        record.append({"class": int(c), **figures})
    return {"drawn": record}
