r"""Linear probing on CIFAR-10-LT: train a linear layer on the frozen features of stage 1.

    python main_cifar10_lineprob_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar10 \
        --resume output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth

The layer is trained on augmented images of a random subset, drawn once, with at most --num_samples images per class.
The last epoch also writes lineprob_bns_cifar10_if<factor>.pth.

Without --resume it probes a random encoder. With --eval FILE it evaluates a checkpoint of this script instead.
"""
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from engine import evaluate, load_data, predict, train_one_epoch, warm_up_then_cosine
from models import Classifier, create_encoder
from util.augment import create_augment
from util.batches import DeviceLoader
from util.ip_dpp import draw_subset
from util.run import Run
from util.run.checkpoint import load_weights
from util.run.options import Parser, launch


def get_args_parser():
    parser = Parser(__doc__, ["data", "model", "classifier", "optimisation", "run"])
    parser.set_defaults(
        stage="lineprob_bns", dataset="cifar10",
        # data and augmentation: at most 100 images per class, jitter as in the published code (1 for CIFAR-100)
        data_root="/mnt/data/cifar10", imbalanced_factor=100, num_classes=10, input_size=32,
        augment="simclr", min_crop=0.08, jitter_strength=2.0,
        num_samples=100,
        # model
        model="resnet18", logit_adjustment=1.0,
        # optimisation: AdamW (or SGD), linear warm-up to blr * (images per step) / 256, then half a cosine
        epochs=100, batch_size=64, blr=1e-3, min_lr=0.0, warmup_epochs=20, weight_decay=0.05,
        opt="adamw", amp="auto", seed=0,
        # run
        output_dir="./output_dir/cifar10/lineprob_bns_cifar10", eval_freq=1, save_freq=10, keep_checkpoints=3,
        device="auto")
    return parser


def main(args):
    with Run(args) as run:
        return probe(args, run)


def probe(args, run):
    train_set, test_set = load_data(run)
    counts = train_set.class_counts.clip(max=args.num_samples)  # images per class that are trained on

    torch.manual_seed(args.seed)
    model = Classifier(create_encoder(args.model), args.num_classes, frozen=True)
    model.to(run.device, memory_format=torch.channels_last)
    criterion = torch.nn.CrossEntropyLoss()

    if args.eval:
        load_weights(model, run.evaluated["model"], f"--eval {args.eval}")
        logits = predict(model, test_set.images, run)
        return evaluate(logits, test_set, train_set, counts, args.logit_adjustment, run)

    augment = create_augment(args.augment, args.input_size, args.jitter_strength, args.min_crop)
    loader = DeviceLoader(train_set, augment, run.processes, args.batch_size, args.seed)
    steps = len(loader.batch_sizes(counts.sum()))

    lr = args.lr or args.blr * args.batch_size * run.processes.world_size / 256
    groups = param_groups_weight_decay(model, args.weight_decay)  # weights decay, biases and norms do not
    optimizer = create_optimizer_v2(groups, args.opt, lr, momentum=0.9, betas=(0.9, 0.95), fused=True)
    scheduler = warm_up_then_cosine(optimizer, args.epochs, args.warmup_epochs, args.min_lr, steps)

    network = run.begin(model, optimizer, steps)  # loads --resume, locks the output folder, wraps for DDP and --compile
    subset = run.subset
    if subset is None:
        subset = run.processes.from_first(
            draw_subset, None, train_set.labels.cpu(), args.num_samples, (args.seed, 0), "uniform")
    features = predict(model.enc, test_set.images, run)  # once, since the encoder never changes
    for epoch in run.epochs():
        batches = loader.epoch(epoch, subset)
        stats = train_one_epoch(network, criterion, batches, optimizer, scheduler, epoch, run)
        if run.evaluates(epoch):
            logits = predict(model.lin, features, run)
            stats |= evaluate(logits, test_set, train_set, counts, args.logit_adjustment, run)
        run.end_epoch(epoch, stats, subset)  # writes log.txt and, if it is time, a checkpoint
    return run.finish()


if __name__ == "__main__":
    launch(main, get_args_parser())
