"""The recipes of the stages and their loops: `pretrain` is stage 1, `train_classifier` are probing and stage 2.

A recipe gathers data and model and says what the loss of one batch is; `fit` trains, for every stage alike. All
randomness of a step comes from (seed, epoch, step, process), so that a resumed run repeats an uninterrupted one.
"""
import math
import resource
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from models import BNSNetwork, Classifier, create_encoder
from util.augment import SimCLRAugment
from util.bns_loss import BNSLoss
from util.checkpoint import load_checkpoint, load_newest, load_weights, stage_of
from util.errors import UserError
from util.figures import accuracy_bars, class_balanced, confusion_heatmap
from util.imbalanced_cifar import ImbalanceCIFAR10, ImbalanceCIFAR100
from util.ip_dpp import class_stream, draw, inclusion_probabilities
from util.logs import Progress, RunLog
from util.metrics import KNNClassifier, adjust_logits, classification_metrics, confusion_matrix, log_class_shares
from util.options import Unset
from util.processes import Processes, keep_freed_memory
from util.run_folder import RunFolder
from util.signals import Interrupted, StopSignal
from util.toy_data import ToyCIFAR

EVAL_BATCH = 500  # whatever --batch_size is, so that the same weights always give the same figures
GROUPS = ("many", "medium", "few")
EPOCH_END = 0.999  # where an epoch's results are drawn; a run resumed at the next one takes back what lies at 1
FIGURES = 10  # evaluations of a run that are drawn, the last one included; TensorBoard shows as many pictures of a tag
PROJECTED = 1000  # test images in the embedding projector
SHOWN_CLASSES = 5  # largest classes whose draws are logged
DATA = ("dataset", "toy_data", "imbalanced_factor")
OF_CHECKPOINT = ("toy_data", "imbalanced_factor", "model", "input_size", "num_samples", "ipdpp_sampler", "loss")
SAME_RUN = (*DATA, "num_classes", "model", "input_size", "embed_dim")
MAY_CHANGE = ("epochs", "batch_size", "accum_iter", "lr", "blr", "min_lr", "warmup_epochs", "weight_decay", "seed",
              "jitter_strength", "temperature", "bns_form", "num_extra_positives", "num_samples", "sampling_freq",
              "ipdpp_sampler", "ipdpp_kernel", "mcmc_steps", "loss", "amp")


def pretrain(args):
    """Stage 1: train encoder and projector with BNS on two views of each image (paper, section 4)."""
    processes, autocast = prepare(args)
    if args.eval:
        evaluated = checkpoint_to_evaluate(args, processes)
    train_set = load_data(args, processes, train=True)
    test_set = load_data(args, processes, train=False)
    images, labels = on_device(train_set, processes.device)
    test_images, test_labels = on_device(test_set, processes.device)

    def measure(encoder):
        """Figures of the kNN classifier on an encoder's features."""
        features = predict(encoder, images, processes, autocast, args.input_size)
        queries = predict(encoder, test_images, processes, autocast, args.input_size)
        votes = predict(KNNClassifier(features, labels, args.num_classes), queries, processes, autocast, args.input_size)
        metrics = classification_metrics(votes.cpu(), test_labels.cpu(), train_set.class_counts, train_set.shot_thresholds)
        report_shots("* kNN", metrics, processes)
        return {f"knn_{name}": metrics[name] for name in ("acc1", *GROUPS)}

    torch.manual_seed(args.seed)
    if args.eval:
        encoder = create_encoder(args.model, args.input_size)
        load_encoder(encoder, evaluated, f"--eval {args.eval}")
        metrics = measure(encoder.to(processes.device, memory_format=torch.channels_last))
        processes.end()
        return metrics

    check_batch_size(args, processes, len(train_set))
    model = BNSNetwork(create_encoder(args.model, args.input_size), args.embed_dim)
    model.to(processes.device, memory_format=torch.channels_last)
    checkpoint, path = find_checkpoint(args, processes)
    if checkpoint:
        check_same_run(args, checkpoint, path, processes)
        load_weights(model, checkpoint["model"], f"--resume {path}")

    augment = SimCLRAugment(args.input_size, args.jitter_strength)
    criterion = BNSLoss(args.temperature, args.bns_form, args.num_extra_positives)

    def batch_loss(network, batch):
        pixels = images[batch]
        views = [augment(pixels, torch.default_generator) for _ in range(2)]
        with autocast():
            projections = network(*(view.contiguous(memory_format=torch.channels_last) for view in views))
        return criterion(*projections, labels[batch])

    everything = torch.arange(len(images))

    def first_views(log):
        pixels = images[epoch_batches(everything, 32, 1, args.seed, 0, processes)[0]]
        generator = torch.Generator().manual_seed(args.seed)
        views = torch.stack([augment(pixels, generator) for _ in range(2)], dim=1)
        log.image("input/two views of each image, side by side", views.flatten(0, 1).cpu(), 0)

    def evaluate(epoch, log):
        figures = measure(model.enc)
        log.scalars({name.replace("_", "/"): value for name, value in figures.items() if value is not None}, epoch + EPOCH_END)
        return figures

    return fit(args, processes, model, batch_loss, len(images), lambda epoch, previous, log: (everything, {}),
               checkpoint, path, evaluate, drop_last=True, describe=first_views)


def train_classifier(args):
    """Probing (linear layer on the frozen encoder) and stage 2 (both trained on IP-DPP's draws; paper, section 5)."""
    probing = args.stage == "lineprob_bns"
    sampler = "uniform" if probing else args.ipdpp_sampler
    processes, autocast = prepare(args)
    if args.eval:
        evaluated = checkpoint_to_evaluate(args, processes)
        sampler = "uniform" if probing else args.ipdpp_sampler
    train_set = load_data(args, processes, train=True)
    test_set = load_data(args, processes, train=False)
    counts = train_set.class_counts
    trained_counts = counts if sampler == "none" else np.minimum(counts, args.num_samples)
    adjusts_in_training = not probing and args.loss == "logit_adjusted"
    tau = 0 if adjusts_in_training else args.logit_adjustment
    log_shares = log_class_shares(trained_counts).float().to(processes.device)
    test_images, test_labels = on_device(test_set, processes.device)
    test_labels = test_labels.cpu()

    torch.manual_seed(args.seed)
    model = Classifier(create_encoder(args.model, args.input_size), args.num_classes, frozen=probing)
    model.to(processes.device, memory_format=torch.channels_last)

    def measure(network, inputs):
        logits = predict(network, inputs, processes, autocast, args.input_size).cpu()
        metrics = classification_metrics(logits, test_labels, counts, train_set.shot_thresholds)
        report(metrics, len(test_labels), processes)
        if tau:
            adjusted = classification_metrics(
                adjust_logits(logits, trained_counts, tau), test_labels, counts, train_set.shot_thresholds)
            report_shots(f"* logit-adjusted (tau {tau:g}):", adjusted, processes)
            metrics |= {f"adjusted_{name}": adjusted[name] for name in ("acc1", *GROUPS)}
        return metrics, logits

    if args.eval:
        check_stage(args, evaluated, f"--eval {args.eval}", [args.stage], strict="stage" in evaluated["args"])
        load_weights(model, evaluated["model"], f"--eval {args.eval}")
        metrics, _ = measure(model, test_images)
        if processes.first:
            print("accuracy per class, in order of training images: "
                  + " ".join(f"{fraction:.3f}" for fraction in metrics["per_class"]))
        processes.end()
        return metrics

    check_batch_size(args, processes, len(train_set))
    images, labels = on_device(train_set, processes.device)
    checkpoint, path = find_checkpoint(args, processes)
    if checkpoint:
        check_stage(args, checkpoint, f"--resume {path}", ["pretrain_bns", args.stage])
        if stage_of(checkpoint) == "pretrain_bns":
            load_encoder(model.enc, checkpoint, f"--resume {path}")
            other = [f"{name} {checkpoint['args'][name]}" for name in DATA
                     if checkpoint["args"].get(name, getattr(args, name)) != getattr(args, name)]
            say(processes, f"starting from the extractor {path}"
                + f", which, unlike this run, was trained with {' '.join(other)}" * bool(other))
            checkpoint = None
        else:
            check_same_run(args, checkpoint, path, processes)
            load_weights(model, checkpoint["model"], f"--resume {path}")
    else:
        say(processes, "no --resume: starting from a randomly initialised encoder")
    # The probe's encoder never changes, so its test features are computed once.
    measured = (model.lin, predict(model.enc, test_images, processes, autocast, args.input_size)) if probing else (
        model, test_images)

    augment = SimCLRAugment(args.input_size, args.jitter_strength)

    def batch_loss(network, batch):
        views = augment(images[batch], torch.default_generator).contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = network(views)
        if adjusts_in_training:
            logits = logits + log_shares
        return F.cross_entropy(logits, labels[batch])

    def choose_images(epoch, previous, log):
        if sampler == "none":
            return torch.arange(len(images)), {}
        due = not probing and (epoch + 1) % args.sampling_freq == 0 and epoch < args.epochs - 1
        if previous is not None and not due:
            return previous, {}
        log_p, margins = np.zeros(len(images)), np.zeros(len(images))
        cut = np.flatnonzero(counts[train_set.targets] > args.num_samples)
        if len(cut) and not probing:
            logits = predict(model, images[cut], processes, autocast, args.input_size)
            log_p[cut] = true_label_log_probabilities(logits, labels[cut])
            margins[cut] = true_label_margins(logits, labels[cut])
        drawn = processes.from_first(lambda: draw_balanced(
            log_p, np.asarray(train_set.targets), args.num_samples, args.seed, epoch, sampler,
            getattr(args, "ipdpp_kernel", "paper"), getattr(args, "mcmc_steps", 1)))
        if probing or not processes.first:
            return torch.from_numpy(drawn), {}
        return torch.from_numpy(drawn), log_draw(args, log, epoch, train_set, log_p, margins, drawn, previous)

    def evaluate(epoch, log):
        metrics, logits = measure(*measured)
        if processes.first:
            log.scalars({f"test/{name}": metrics[name] for name in ("acc1", "acc5", "loss")}, epoch + EPOCH_END)
            log.scalars({f"test_shots/{name}": metrics[name] for name in GROUPS
                         if metrics[name] is not None}, epoch + EPOCH_END)
            log.scalars({name.replace("adjusted_", "test_adjusted/"): value for name, value in metrics.items()
                         if name.startswith("adjusted_") and value is not None}, epoch + EPOCH_END)
            if (args.epochs - 1 - epoch) % math.ceil(args.epochs / FIGURES) == 0:
                confusion = confusion_matrix(logits, test_labels)
                bars = accuracy_bars(confusion, counts, train_set.shot_thresholds, train_set.classes)
                log.image("test/accuracy per class", bars, epoch + EPOCH_END)
                log.image("test/confusion", confusion_heatmap(confusion, counts, train_set.classes), epoch + EPOCH_END)
        if epoch == args.epochs - 1:
            shown = class_balanced(test_labels, PROJECTED)
            features = predict(model.enc, test_images[shown], processes, autocast, args.input_size)
            predicted = logits[shown].argmax(dim=1)
            names = [[train_set.classes[c], train_set.classes[p], counts[c]] for c, p in zip(test_labels[shown], predicted)]
            log.embedding(features, names, ["class", "predicted class", "training images"], test_images[shown], epoch + 1)
        return {f"test_{name}": value for name, value in metrics.items()}

    per_epoch = len(images) if sampler == "none" else int(np.minimum(counts, args.num_samples).sum())
    return fit(args, processes, model, batch_loss, per_epoch, choose_images, checkpoint, path, evaluate)


# ---------------------------------------------------------------------------------------------- before training


def prepare(args):
    """Check what flags say together, start the processes. Returns them and a factory of autocast contexts."""
    processes = Processes(args.device)
    if processes.device.type == "cpu":
        keep_freed_memory()
    if isinstance(args.warmup_epochs, Unset) and args.warmup_epochs >= args.epochs:
        say(processes, f"--warmup_epochs: the default of {args.warmup_epochs} does not fit --epochs {args.epochs}, "
            f"so {args.epochs // 5} it is")
        args.warmup_epochs = args.epochs // 5
    args.warmup_epochs = int(args.warmup_epochs)
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup_epochs: found {args.warmup_epochs}, expected fewer than --epochs {args.epochs}")
    if (args.start_epoch or 0) >= args.epochs:
        raise UserError(f"--start_epoch: found {args.start_epoch}, expected less than --epochs {args.epochs}")
    classes = {"cifar10": 10, "cifar100": 100}[args.dataset]
    if args.num_classes != classes:
        raise UserError(f"--num_classes: found {args.num_classes}, expected {classes}, which {args.dataset} has")
    dtype = amp_dtype(args.amp, processes.device)
    args.amp = str(dtype).removeprefix("torch.") if dtype else "none"
    torch.backends.cudnn.benchmark = True
    return processes, lambda: torch.autocast(processes.device.type, dtype=dtype, enabled=dtype is not None)


def amp_dtype(name, device):
    """The type that `--amp name` means on `device`: torch.bfloat16, torch.float16, or None for float32 throughout."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def load_data(args, processes, train):
    """The data set that the flags name. Where it is missing, the first process downloads it for all."""
    if args.toy_data:
        return ToyCIFAR(args.num_classes, args.imbalanced_factor, train)
    dataset = {"cifar10": ImbalanceCIFAR10, "cifar100": ImbalanceCIFAR100}[args.dataset]
    processes.from_first(lambda: dataset(args.data_root, args.imbalanced_factor, train, download=True) and None)
    return dataset(args.data_root, args.imbalanced_factor, train)


def check_batch_size(args, processes, num_images):
    """Refuse a batch, over all processes, of more images than the training set has."""
    if args.batch_size * processes.world_size > num_images:
        raise UserError(f"--batch_size: found {args.batch_size} images in each of {processes.world_size} process(es), "
                        f"expected at most {num_images} together, the images of the training set")


def on_device(dataset, device):
    """All images as uint8 (N, 3, 32, 32) and all labels as int64 (N,) on `device`."""
    return torch.from_numpy(dataset.data).to(device).permute(0, 3, 1, 2), torch.tensor(dataset.targets, device=device)


def find_checkpoint(args, processes):
    """What --resume names, as (checkpoint, path); (None, None) where there is nothing to resume."""
    wanted = list(args.resume or [])
    if len(wanted) > 2 or (len(wanted) == 2 and wanted[0] != "auto") or "auto" in wanted[1:]:
        raise UserError(f"--resume: found '{' '.join(wanted)}', expected FILE, auto, or auto FILE")
    if wanted[:1] == ["auto"]:
        wanted.pop(0)
        newest = processes.from_first(lambda: load_newest(args.output_dir, args.stage)[0])
        if newest:
            wanted = [newest]
        else:
            say(processes, f"--resume auto: no checkpoint in {args.output_dir}, starting afresh")
    return (load_checkpoint(wanted[0]), Path(wanted[0])) if wanted else (None, None)


def checkpoint_to_evaluate(args, processes):
    """The checkpoint of --eval. Flags about it that the user did not give take its values, in `args`."""
    checkpoint = load_checkpoint(args.eval, "--eval")
    taken, trained = [], checkpoint["args"]
    if args.given & {"data_root", "toy_data"} and bool(trained.get("toy_data")) != args.toy_data:
        args.given.add("toy_data")
    for name in OF_CHECKPOINT:
        if trained.get(name) is None or not hasattr(args, name) or trained[name] == getattr(args, name):
            continue
        if name in args.given:
            say(processes, f"--{name} {getattr(args, name)} wins over {trained[name]}, with which {args.eval} was trained")
        elif name != "model" or timm.is_model(trained[name]):
            taken.append(f"{name} {trained[name]}")
            setattr(args, name, trained[name])
    if taken:
        say(processes, f"from the checkpoint: {', '.join(taken)}")
    return checkpoint


def load_encoder(encoder, checkpoint, source):
    """Copy the weights of a checkpoint's encoder, whatever its stage, into `encoder`."""
    weights = {name[4:]: value for name, value in checkpoint["model"].items() if name.startswith("enc.")}
    if not weights:
        raise UserError(f"{source} holds no encoder, expected weights whose names begin with 'enc.'")
    load_weights(encoder, weights, source)


def check_stage(args, checkpoint, source, expected, strict=True):
    """Refuse a checkpoint of a stage that is not `expected`; unless `strict`, any with a linear layer will do."""
    stage = stage_of(checkpoint)
    if stage not in expected and (strict or "lin.weight" not in checkpoint["model"]):
        raise UserError(f"{source} holds {f'a checkpoint of stage {stage}' if stage else 'neither projector nor linear layer'}"
                        f", expected one of {' or '.join(expected)}")


def check_same_run(args, checkpoint, path, processes):
    """Refuse to continue a run of other data or another model; say aloud what else has changed."""
    check_stage(args, checkpoint, f"--resume {path}", [args.stage])
    for name in (*SAME_RUN, *MAY_CHANGE):
        before, now = (flags.get(name) for flags in (checkpoint["args"], vars(args)))
        if name not in checkpoint["args"] or not hasattr(args, name) or now == before:
            continue
        if name in SAME_RUN:
            raise UserError(f"--resume {path} was trained with --{name} {before}, found --{name} {now}; "
                            "expected the same, or another --output_dir and no --resume")
        say(processes, f"--{name}: {before} in the checkpoint, {now} from here on")


def say(processes, text):
    if processes.first:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------- training


def fit(args, processes, model, batch_loss, per_epoch, choose_images, checkpoint, path, evaluate=None,
        drop_last=False, describe=None):
    """Train `model`, write logs and checkpoints, and return the history: one dict per epoch.

    Args:
        batch_loss: (network, int64 indices on the device) -> scalar loss.
        per_epoch: images per epoch.
        choose_images: (epoch, indices of the epoch before or None, log) -> (int64 indices on the CPU, dict to log).
        checkpoint, path: of the run to continue (else None), as `load_checkpoint` gives it, and where it lies.
        evaluate: (epoch, log) -> dict to log.
        drop_last: leave an epoch's incomplete last batch out.
        describe: (log) -> None, called once at the start of a fresh run.
    """
    device, first = processes.device, processes.first
    global_batch = args.batch_size * processes.world_size
    steps = per_epoch // global_batch if drop_last else math.ceil(per_epoch / global_batch)
    lr = args.lr or args.blr * global_batch * args.accum_iter / 256
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr, (0.9, 0.95), fused=True)
    updates = math.ceil(steps / args.accum_iter)
    # timm: only these arguments make it linear warm-up from 0 followed by half a cosine over the remaining epochs.
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs - args.warmup_epochs, min_lr=args.min_lr, warmup_lr=0,
        warmup_epochs=args.warmup_epochs, warmup_prefix=True, step_on_epochs=False, updates_per_epoch=updates)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")

    start, first_step, history, subset, record, curves = 0, 0, [], None, {}, {}
    if checkpoint:
        restore_optimizer(optimizer, scaler, checkpoint, path)
        start, history, subset = checkpoint.get("epoch", -1) + 1, checkpoint.get("history", []), checkpoint.get("subset")
        partial = checkpoint.get("partial")
        if partial and partial["steps"] == steps and args.start_epoch in (None, start):
            first_step, record = partial["step"], partial["record"]
            curves = {name: list(values.to(device)) for name, values in partial["curves"].items()}
    if args.start_epoch is not None:
        start, history = args.start_epoch, history[:args.start_epoch]

    folder = RunFolder(args.output_dir, args.log_dir or args.output_dir,
                       f"{args.stage}_{args.dataset}_if{args.imbalanced_factor:g}.pth", args.save_freq, args.keep_checkpoints)
    # `auto` stands for the folder's own run, also where that was cut off before its first checkpoint.
    continues = folder.final if args.resume and args.resume[0] == "auto" else checkpoint and path
    processes.from_first(lambda: folder.claim(continues, args.overwrite))
    # An epoch begun has only its draw in TensorBoard, at its very start; what its steps gave is drawn when it is over.
    log = RunLog(folder.folder, folder.log_dir, start + (0.001 if first_step else 0), quiet=not first)
    log.write_history(history)
    network = torch.compile(model) if args.compile else model
    if processes.world_size > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    if describe and not checkpoint:
        describe(log)
    say(processes, f"{args.stage} on {'toy data like ' * args.toy_data}{args.dataset} at IF {args.imbalanced_factor:g}: "
        f"{per_epoch} images and {steps} steps an epoch, {args.model}, {device}, amp {args.amp}, lr {lr:g}, "
        f"{processes.world_size} process(es)" + (f"; continuing {path} in epoch {start}" if checkpoint else ""))

    def state(epoch, partial=None):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                "scaler": scaler.state_dict(), "args": {name: value for name, value in vars(args).items() if name != "given"}, "history": history, "subset": subset,
                "partial": partial}

    def leave(what, epoch, partial=None):
        log.draw("close")
        processes.from_first(lambda: folder.save(state(epoch, partial), epoch, now=True))  # all wait until it is saved
        processes.end()
        raise Interrupted(stop.signum or signal.SIGTERM, f"{what}; add --resume auto to the command to go on from there")

    progress = Progress(args.epochs * steps, start * steps + first_step, quiet=not first)
    with StopSignal() as stop:
        for epoch in range(start, args.epochs):
            if first_step == 0:
                subset, record = choose_images(epoch, subset, log)
                curves = {"train_loss": [], "lr": [], "train/gradient_norm": []}
            batches = epoch_batches(subset, args.batch_size, steps, args.seed, epoch, processes)
            began = time.monotonic()
            done = train_one_epoch(args, processes, network, batch_loss, optimizer, scaler, scheduler, batches, epoch,
                                   first_step, curves, progress, stop)
            if processes.world_size > 1:  # all evaluate with the statistics of the first process, which are those saved
                distribute_bn(model, processes.world_size)
            means = {name: processes.mean(torch.stack(values)) for name, values in curves.items()}
            train_loss = means["train_loss"].double().mean().item()
            speed = sum(map(len, batches[first_step:done])) * processes.world_size / (time.monotonic() - began)
            check_finite(train_loss, epoch, model)
            stopped = processes.any(stop.signum is not None)
            if done < steps:
                partial = {"step": done, "steps": steps, "record": record,
                           "curves": {name: values.cpu() for name, values in means.items()}}
                leave(f"stopped in epoch {epoch} after step {done} of {steps}", epoch - 1, partial)
            last = epoch == args.epochs - 1
            record = {"epoch": epoch, "train_loss": train_loss, "train_lr": optimizer.param_groups[0]["lr"],
                      "train_images": min(per_epoch, steps * global_batch), **record}
            progress.say(f"epoch {epoch}  train_loss {train_loss:.4f}  lr {record['train_lr']:.6f}  {speed:,.0f} images/s")
            if evaluate and (last or (epoch + 1) % args.eval_freq == 0):
                record.update(evaluate(epoch, log))
                best = max(r.get("test_acc1", -1) for r in [*history, record])
                if best >= 0:
                    progress.say(f"Max accuracy: {best:.2f}%")
            history.append(record)
            log_epoch(log, epoch, means, speed, device)
            log.write_history(history)
            if stopped and not last:
                leave(f"stopped after epoch {epoch}", epoch)
            if first:
                folder.save(state(epoch), epoch, last)
            first_step = 0
    summarise(args, processes, log, folder, history)
    processes.end()
    return history


def train_one_epoch(args, processes, network, batch_loss, optimizer, scaler, scheduler, batches, epoch, first_step,
                    curves, progress, stop):
    """Train on `batches` from `first_step` on, appending each step's figures to the lists of `curves` on the device.

    Nothing here waits for the device except a progress line. Returns the steps done: fewer than all where `stop` came.
    """
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    steps, updates = len(batches), math.ceil(len(batches) / args.accum_iter)
    for step in range(first_step, steps):
        update, part = divmod(step, args.accum_iter)
        parts = min(args.accum_iter, steps - update * args.accum_iter)
        if part == 0:
            scheduler.step_update(epoch * updates + update)
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(stream(args.seed, epoch, step, processes.rank))
        loss = batch_loss(network, batches[step])
        scaler.scale(loss / parts).backward()
        curves["train_loss"].append(loss.detach())
        if progress.due():
            check_finite(loss.item(), epoch)
            progress.show(f"epoch {epoch}  step {step + 1}/{steps}  loss {loss.item():.4f}")
        if part + 1 < parts:
            continue
        scaler.unscale_(optimizer)
        curves["train/gradient_norm"].append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        curves["lr"].append(torch.full((), optimizer.param_groups[0]["lr"], device=loss.device))
        scaler.step(optimizer)
        scaler.update()
        if processes.any(stop.signum is not None):
            return step + 1
    return steps


def epoch_batches(subset, batch_size, steps, seed, epoch, processes):
    """This process's share of an epoch: a list of `steps` int64 index tensors on the device, in random order.

    With several processes, an incomplete last batch is filled up with the epoch's first images until all get as many.
    """
    order = subset[torch.randperm(len(subset), generator=torch.Generator().manual_seed(stream(seed, epoch)))]
    order = torch.cat((order, order[:-len(order) % processes.world_size])).to(processes.device)
    batches = order.split(batch_size * processes.world_size)[:steps]
    return [batch[processes.rank::processes.world_size] for batch in batches]


def stream(*key):
    """A seed for PyTorch's generators, one per tuple of non-negative integers."""
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)  # (1,) is not (1, 0)


def check_finite(loss, epoch, model=None):
    """Refuse to go on (and to save) with a loss, or a weight of `model`, that is not finite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in epoch {epoch}, expected a finite one: lower --lr or --blr, "
                        "or try --amp none; the checkpoints before it are as they were")
    if model is not None and not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError(f"a weight stopped being finite in epoch {epoch}: lower --lr or --blr, or try --amp none; "
                        "the checkpoints before it are as they were")


def restore_optimizer(optimizer, scaler, checkpoint, path):
    """Load moments and scale of a checkpoint; learning rate and weight decay stay what the flags say."""
    groups = optimizer.state_dict()["param_groups"]
    saved = checkpoint.get("optimizer") or {}
    shapes = {i: p.shape for ids, group in zip(groups, optimizer.param_groups) for i, p in zip(ids["params"], group["params"])}
    state = saved.get("state", {})
    if {i: entry["exp_avg"].shape for i, entry in state.items() if "exp_avg" in entry} != shapes:
        print(f"--resume {path}: its optimiser state is of other parameters; the optimiser starts afresh", flush=True)
        return
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])


# ---------------------------------------------------------------------------------------------- prediction and draws


@torch.inference_mode()
def predict(network, inputs, processes, autocast, input_size):
    """Outputs of `network` in eval mode, float32 (N, ...) on the device, for images or features of all processes.

    uint8 images (N, 3, H, W) become floats in [0, 1], resized to `input_size` where theirs is another.
    """
    network.eval()
    outputs = None
    for number, start in enumerate(range(0, len(inputs), EVAL_BATCH)):
        if number % processes.world_size != processes.rank and outputs is not None:
            continue
        batch = inputs[start:start + EVAL_BATCH]
        if batch.dtype == torch.uint8:
            batch = batch.float().div(255).contiguous(memory_format=torch.channels_last)
            if batch.shape[-1] != input_size:
                batch = F.interpolate(batch, size=(input_size, input_size), mode="bilinear", antialias=True)
        with autocast():
            output = network(batch).float()
        if outputs is None:
            outputs = output.new_zeros(len(inputs), *output.shape[1:])
        if number % processes.world_size == processes.rank:
            outputs[start:start + EVAL_BATCH] = output
    return processes.sum(outputs)


def true_label_log_probabilities(logits, labels):
    """log p of the true label, float64 (N,) in NumPy, of logits (N, C)."""
    log_probabilities = F.log_softmax(logits.double(), dim=1)
    return log_probabilities.gather(1, labels[:, None])[:, 0].cpu().numpy()


def true_label_margins(logits, labels):
    """The true label's logit minus the largest other, float64 (N,) in NumPy, of logits (N, C): below 0 where wrong."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (own[:, 0] - others.amax(1)).double().cpu().numpy()


def draw_balanced(log_p, targets, num_samples, seed, epoch, sampler, kernel, mcmc_steps):
    """At most `num_samples` images of each class: ascending int64 indices.

    Args:
        log_p: float64 (N,), log probability of each image's true label; used of classes with more images than that.
        targets: int64 (N,).
        seed, epoch: with the class, they determine the draw.
    """
    chosen = []
    for c in np.unique(targets):
        members = np.flatnonzero(targets == c)
        if len(members) > num_samples:
            rng = class_stream(seed, epoch, int(c))
            members = members[draw(log_p[members], num_samples, rng, sampler, kernel, mcmc_steps)]
        chosen.append(members)
    return np.concatenate(chosen)


def log_draw(args, log, epoch, train_set, log_p, margins, drawn, previous):
    """Show what was drawn of the largest classes, in TensorBoard and as a dict for log.txt."""
    targets, record = np.asarray(train_set.targets), []
    for c in np.argsort(-train_set.class_counts, kind="stable")[:SHOWN_CLASSES]:
        members = np.flatnonzero(targets == c)
        if len(members) <= args.num_samples:
            continue
        mine = np.intersect1d(drawn, members)
        left = np.setdiff1d(members, drawn)
        figures = {"mean_p": float(np.exp(log_p[members]).mean()), "drawn_mean_p": float(np.exp(log_p[mine]).mean()),
                   "left_mean_p": float(np.exp(log_p[left]).mean()),
                   "drawn_margin": float(margins[mine].mean()), "left_margin": float(margins[left].mean())}
        if previous is not None:
            figures["changed"] = len(np.setdiff1d(mine, previous))
        if args.ipdpp_sampler != "uniform":
            inclusion = inclusion_probabilities(log_p[members], args.num_samples, args.ipdpp_kernel)
            figures |= {"max_inclusion": float(inclusion.max()), "min_inclusion": float(inclusion.min())}
            ranked = members[np.argsort(-inclusion, kind="stable")]
            sheet = torch.from_numpy(train_set.data[np.concatenate([ranked[:16], ranked[-16:]])]).permute(0, 3, 1, 2)
            log.image(f"train_ipdpp/{train_set.classes[c]}/most and least likely drawn", sheet, epoch)
        log.scalars({f"train_ipdpp/{train_set.classes[c]}/{name}": value for name, value in figures.items()}, epoch)
        record.append({"class": int(c), **figures})
    return {"drawn": record}


# ---------------------------------------------------------------------------------------------- reports


def report(metrics, num_images, processes):
    """Print an evaluation in the lines that users of the published code know, by the first process."""
    if not processes.first:
        return
    print(f"* Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.3f}")
    print(f"Accuracy of the network on the {num_images} test images: {metrics['acc1']:.1f}%")
    print("* " + " ".join(f"{name.capitalize()}-Shot Acc@1 " + ("none" if metrics[name] is None else f"{metrics[name]:.3f}")
                          for name in GROUPS), flush=True)


def report_shots(title, metrics, processes):
    """Print overall and shot accuracy in one line, by the first process."""
    shots = " ".join(f"{name.capitalize()}-Shot " + ("none" if metrics[name] is None else f"{metrics[name]:.3f}")
                     for name in GROUPS)
    say(processes, f"{title} Acc@1 {metrics['acc1']:.3f} {shots}")


def log_epoch(log, epoch, curves, speed, device):
    """Draw the steps' figures over the epoch, and its throughput and memory at the end of it."""
    for tag, values in curves.items():
        for i, value in enumerate(values.tolist()):
            log.scalars({tag: value}, epoch + (i + 0.5) / len(values))
    log.scalars({"train/images_per_second": speed, "train/peak_memory_gib": peak_memory(device)}, epoch + EPOCH_END)
    log.draw("flush")


def peak_memory(device):
    """Most memory in use so far, in GiB: of the device, or of the process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def summarise(args, processes, log, folder, history):
    """Close the log and say what the run reached, where its files lie and what to run next."""
    log.hyperparameters({name: getattr(args, name) for name in ("stage", *SAME_RUN, *MAY_CHANGE) if hasattr(args, name)})
    log.draw("close")
    if not processes.first:
        return
    tested = [record for record in history if "test_acc1" in record]
    if tested:
        best = max(tested, key=lambda record: record["test_acc1"])
        print(f"last epoch {tested[-1]['epoch']}: {tested[-1]['test_acc1']:.2f}%; "
              f"best epoch {best['epoch']}: {best['test_acc1']:.2f}%")
    print(f"peak memory {peak_memory(processes.device):.2f} GiB on {processes.device}")
    print(f"wrote {folder.final}, {folder.folder / 'log.txt'} and TensorBoard events in {folder.log_dir}")
    data = ["--toy_data"] if args.toy_data else ["--data_root", args.data_root]
    command = ["python", f"main_{args.dataset}_{args.stage}.py", "--imbalanced_factor", f"{args.imbalanced_factor:g}",
               "--model", args.model, "--input_size", str(args.input_size), *data]
    if args.stage == "pretrain_bns":
        for script in ("lineprob_bns", "finetune_ipdpp"):
            command[1] = f"main_{args.dataset}_{script}.py"
            print("next:", shlex.join([*command, "--resume", str(folder.final)]))
    else:
        print("next:", shlex.join([*command, "--eval", str(folder.final)]))
