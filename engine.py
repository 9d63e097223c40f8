"""The loops that all recipes share: an epoch of training, prediction, evaluation."""
import time
from datetime import timedelta

import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch.nn.utils import get_total_norm

from util.batches import to_device
from util.errors import UserError
from util.imbalanced_cifar import DATASETS
from util.knn import KNNClassifier
from util.logit_adjustment import adjust_logits
from util.metrics import SHOTS, classification_metrics
from util.run.log import EPOCH_END
from util.toy_data import ToyCIFAR

EVAL_BATCH = 500  # fixed, so that results do not depend on --batch_size
SHOW_EVERY = 15.0  # seconds between lines within an epoch


def load_data(run):
    """The training and test set that the flags name, with `images` and `labels` on the device.

    Where CIFAR is missing, the first process downloads it.

    Raises:
        UserError: no usable data, another number of classes, or a batch that is larger than the training set.
    """
    args, processes, dataset = run.args, run.processes, DATASETS[run.args.dataset]
    if args.num_classes != dataset.num_classes:
        raise UserError(f"--num_classes: found {args.num_classes}, expected {dataset.num_classes}, "
                        f"which {args.dataset} has")
    if args.toy_data:
        sets = [ToyCIFAR(args.num_classes, args.imbalanced_factor, train) for train in (True, False)]
    else:
        try:
            processes.from_first(dataset.fetch, args.data_root)
            sets = [dataset(args.data_root, args.imbalanced_factor, train) for train in (True, False)]
        except (OSError, RuntimeError) as error:  # as torchvision and urllib say it
            raise UserError(f"--data_root {args.data_root}: {error}; --toy_data needs no files") from error
    train_set, test_set = (to_device(one, run.device) for one in sets)
    if not args.eval and args.batch_size * processes.world_size > len(train_set):
        raise UserError(f"--batch_size: found {args.batch_size} images in each of {processes.world_size} process(es), "
                        f"expected at most {len(train_set)} together, the images of the training set")
    return train_set, test_set


def warm_up_then_cosine(optimizer, epochs, warmup_epochs, min_lr, steps):
    """A scheduler that raises each learning rate linearly from 0 to its own, then lowers it along half a cosine.

    Call `step_update(number)` before each step, numbered from 0 over the whole run; an epoch has `steps`. The rate is
    its own after `warmup_epochs` and `min_lr` after `epochs`. Where no epoch would remain, the warm-up takes a fifth.

    timm counts the warm-up's epochs twice unless it is told that they come before the cosine (`warmup_prefix`), which
    then has the epochs that remain.
    """
    if warmup_epochs >= epochs:
        warmup_epochs = epochs // 5
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs - warmup_epochs, min_lr=min_lr, warmup_epochs=warmup_epochs, warmup_lr=0,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=steps)
    return scheduler


def train_one_epoch(network, criterion, batches, optimizer, scheduler, epoch, run):
    """Train on the batches of an epoch. Only progress lines, --augment auto and the end of the epoch wait for the GPU.

    Args:
        network: called with all views of a step.
        criterion: (projections of the first view, of the second, labels) or (logits, labels) -> scalar loss.
        batches: yields (views, labels).
        scheduler: timm's, set at every step.

    Returns:
        dict for log.txt: `train_loss`, the mean over the steps; `train_lr`, of the last step; `train_images`.
    """
    network.train()
    losses, rates, norms = [], [], []
    num_images, began = 0, time.monotonic()
    shown = began  # when a line was last printed
    for step, (views, labels) in enumerate(batches):
        scheduler.step_update(epoch * run.steps + step)
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            outputs = network(*views)
        loss = criterion(*outputs, labels) if isinstance(outputs, tuple) else criterion(outputs, labels)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        norms.append(get_total_norm(gradients))
        run.scaler.step(optimizer)
        run.scaler.update()
        losses.append(loss.detach())
        rates.append(optimizer.param_groups[0]["lr"])
        num_images += len(labels)
        if run.processes.first and time.monotonic() - shown >= SHOW_EVERY:
            shown = time.monotonic()
            run.say(f"epoch {epoch}  step {step + 1}/{run.steps}  loss {loss.item():.4f}")
    if run.processes.world_size > 1:  # all take the first process's batch-norm statistics, which are those saved
        distribute_bn(run.model, run.processes.world_size)
    curves = {"train_loss": run.processes.mean(torch.stack(losses)), "lr": torch.tensor(rates),
              "train/gradient_norm": torch.stack(norms)}  # of the mean gradient, the same in all processes
    train_loss = curves["train_loss"].double().mean().item()
    num_images *= run.processes.world_size
    now = time.monotonic()
    speed = num_images / (now - began)
    left = (now - run.began) / (epoch + 1 - run.start_epoch) * (run.args.epochs - 1 - epoch)
    run.log.steps(curves, epoch)
    run.log.scalars({"train/images_per_second": speed}, epoch + EPOCH_END)
    run.say(f"epoch {epoch}  train_loss {train_loss:.4f}  lr {rates[-1]:.6f}  {speed:,.0f} images/s  "
            f"{timedelta(seconds=round(left))} left")
    return {"train_loss": train_loss, "train_lr": rates[-1], "train_images": num_images}


@torch.inference_mode()
def predict(network, inputs, run, batch_size=EVAL_BATCH):
    """Outputs of `network` in eval mode for images or features: float32 (N, ...) on the device.

    uint8 images (N, 3, H, W) become floats in [0, 1] and are resized to --input_size, square.
    """
    network.eval()
    outputs, size = [], (run.args.input_size, run.args.input_size)
    for batch in inputs.split(batch_size):
        if batch.dtype == torch.uint8:
            batch = batch.float().div(255).contiguous(memory_format=torch.channels_last)
            if batch.shape[2:] != size:
                batch = F.interpolate(batch, size=size, mode="bilinear", antialias=True)
        with run.autocast():
            outputs.append(network(batch).float())
    return torch.cat(outputs)


def evaluate(logits, test_set, train_set, counts, tau, run):
    """Print the accuracy of a classifier on the test set, in the format of the published code.

    Args:
        logits: float (N, C), of the test images.
        test_set, train_set: of `load_data`.
        counts: (C,) images that it was trained on, per class.
        tau: strength of the logit adjustment, for which another line is printed; 0 for none.

    Returns:
        dict for log.txt: the figures of `classification_metrics` as `test_...`, and `test_adjusted_...`.
    """
    logits, labels = logits.cpu(), test_set.labels.cpu()
    shots = train_set.class_counts, train_set.shot_thresholds
    metrics = classification_metrics(logits, labels, *shots)
    run.say(f"* Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.3f}")
    run.say(f"Accuracy of the network on the {len(labels)} test images: {metrics['acc1']:.1f}%")
    run.say(f"* {shots_text(metrics)}")
    stats = {f"test_{name}": value for name, value in metrics.items()}
    if tau:
        adjusted = classification_metrics(adjust_logits(logits, counts, tau), labels, *shots)
        run.say(f"* logit-adjusted (tau {tau:g}): Acc@1 {adjusted['acc1']:.3f} {shots_text(adjusted)}")
        stats |= {f"test_adjusted_{name}": adjusted[name] for name in ("acc1", *SHOTS)}
    if run.args.eval:
        by_size = (-train_set.class_counts).argsort(kind="stable")
        per_class = [fraction_text(metrics["per_class"][c]) for c in by_size]
        run.say(f"accuracy per class, in order of training images: {' '.join(per_class)}")
    return stats


def evaluate_knn(encoder, train_set, test_set, run):
    """Print how well the nearest neighbours of the encoder's features classify the test set.

    Returns a dict for log.txt: `knn_acc1` in percent, `knn_many`, `knn_medium`, `knn_few` as fractions.
    """
    features, queries = predict(encoder, train_set.images, run), predict(encoder, test_set.images, run)
    neighbours = KNNClassifier(features, train_set.labels, len(train_set.class_counts))
    votes = predict(neighbours, queries, run).cpu()
    metrics = classification_metrics(votes, test_set.labels.cpu(), train_set.class_counts, train_set.shot_thresholds)
    run.say(f"* kNN Acc@1 {metrics['acc1']:.3f} {shots_text(metrics)}")
    return {f"knn_{name}": metrics[name] for name in ("acc1", *SHOTS)}


def fraction_text(fraction):
    return "none" if fraction is None else f"{fraction:.3f}"


def shots_text(metrics):
    """Such as "Many-Shot Acc@1 0.538 Medium-Shot Acc@1 ..."; "none" where there is no such class."""
    return " ".join(f"{name.capitalize()}-Shot Acc@1 {fraction_text(metrics[name])}" for name in SHOTS)
