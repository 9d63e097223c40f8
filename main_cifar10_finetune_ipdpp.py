r"""Stage 2 on CIFAR-10-LT: fine-tune the features of stage 1 on subsets drawn by IP-DPP.

    python main_cifar10_finetune_ipdpp.py --imbalanced_factor 100 --data_root /mnt/data/cifar10 \
        --resume output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth

The encoder starts from the checkpoint of stage 1, and a new linear layer starts at random. Each class of more than
--num_samples images is cut to that number; smaller classes stay whole. IP-DPP prefers images whose true label gets a
low probability from the current model (clean images, eval mode). It draws before the first epoch, and again before
each --sampling_freq-th one (epochs 9, 19, ..., 89). The first draw says little, since the linear layer is untrained.
Each epoch trains the whole network on one augmented view of every drawn image. The last epoch also writes
finetune_ipdpp_cifar10_if<factor>.pth.

Without --resume the encoder starts at random. Add --ipdpp_sampler none, and this is plain training on all images. A
checkpoint of this stage as --resume continues its run. As --encoder it lends its encoder to a new run. With --eval FILE
the script evaluates a checkpoint instead.
"""
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from engine import evaluate, load_data, predict, train_one_epoch, warm_up_then_cosine
from models import Classifier, create_encoder
from util.augment import create_augment
from util.batches import DeviceLoader
from util.ip_dpp import draw_subset, true_label_log_probabilities
from util.logit_adjustment import LogitAdjustedLoss
from util.run import Run
from util.run.checkpoint import load_weights
from util.run.draws import describe_draw
from util.run.options import Parser, launch


def get_args_parser():
    parser = Parser(__doc__, ["data", "model", "classifier", "information-preservable DPP", "optimisation", "run"])
    parser.set_defaults(
        stage="finetune_ipdpp", dataset="cifar10",
        # data and augmentation
        data_root="/mnt/data/cifar10", imbalanced_factor=100, num_classes=10, input_size=32,
        augment="simclr", min_crop=0.08, jitter_strength=1.0,
        # model and loss
        model="resnet18", loss="cross_entropy", logit_adjustment=1.0,
        # draws: at most 500 images per class; new ones before epochs 9, 19, ..., 89
        num_samples=500, sampling_freq=10, ipdpp_sampler="exact", ipdpp_kernel="paper",
        # optimisation: AdamW (or SGD), linear warm-up to blr * (images per step) / 256, then half a cosine
        epochs=100, batch_size=64, blr=1e-3, min_lr=0.0, warmup_epochs=5, weight_decay=0.05,
        opt="adamw", amp="auto", seed=42,
        # run
        output_dir="./output_dir/cifar10/finetune_ipdpp_cifar10", eval_freq=1, save_freq=10, keep_checkpoints=3,
        device="auto")
    return parser


def main(args):
    with Run(args) as run:
        return finetune(args, run)


def finetune(args, run):
    train_set, test_set = load_data(run)
    # Images per class that are trained on. Logit adjustment subtracts tau * log(share of the class) from test logits.
    counts = train_set.class_counts
    if args.ipdpp_sampler != "none":
        counts = counts.clip(max=args.num_samples)
    tau = 0.0 if args.loss == "logit_adjusted" else args.logit_adjustment

    torch.manual_seed(args.seed)
    model = Classifier(create_encoder(args.model), args.num_classes)
    model.to(run.device, memory_format=torch.channels_last)
    criterion = LogitAdjustedLoss(counts) if args.loss == "logit_adjusted" else torch.nn.CrossEntropyLoss()
    criterion.to(run.device)

    if args.eval:
        load_weights(model, run.evaluated["model"], f"--eval {args.eval}")
        return evaluate(predict(model, test_set.images, run), test_set, train_set, counts, tau, run)

    augment = create_augment(args.augment, args.input_size, args.jitter_strength, args.min_crop)
    loader = DeviceLoader(train_set, augment, run.processes, args.batch_size, args.seed)
    steps = len(loader.batch_sizes(counts.sum()))

    lr = args.lr or args.blr * args.batch_size * run.processes.world_size / 256
    groups = param_groups_weight_decay(model, args.weight_decay)  # weights decay, biases and norms do not
    optimizer = create_optimizer_v2(groups, args.opt, lr, momentum=0.9, betas=(0.9, 0.95), fused=True)
    scheduler = warm_up_then_cosine(optimizer, args.epochs, args.warmup_epochs, args.min_lr, steps)

    network = run.begin(model, optimizer, steps)  # loads --resume, locks the output folder, wraps for DDP and --compile
    subset = torch.arange(len(train_set)) if args.ipdpp_sampler == "none" else run.subset
    for epoch in run.epochs():
        # Draw before the first epoch and every --sampling_freq epochs, as the published code does; not before the last.
        redraw = (epoch + 1) % args.sampling_freq == 0 and epoch < args.epochs - 1
        draw_stats = {}
        if args.ipdpp_sampler != "none" and (subset is None or redraw):
            train_logits = predict(model, train_set.images, run)  # by the current model in eval mode, of clean images
            log_p = true_label_log_probabilities(train_logits, train_set.labels)
            previous = subset
            subset = run.processes.from_first(
                draw_subset, log_p, train_set.labels.cpu(), args.num_samples, (args.seed, epoch),
                args.ipdpp_sampler, args.ipdpp_kernel)
            kernel = None if args.ipdpp_sampler == "uniform" else args.ipdpp_kernel
            draw_stats = describe_draw(run.log, epoch, train_logits, train_set, subset, previous, kernel)
        batches = loader.epoch(epoch, subset)
        stats = train_one_epoch(network, criterion, batches, optimizer, scheduler, epoch, run) | draw_stats
        if run.evaluates(epoch):
            logits = predict(model, test_set.images, run)
            stats |= evaluate(logits, test_set, train_set, counts, tau, run)
        run.end_epoch(epoch, stats, subset)  # writes log.txt and, if it is time, a checkpoint
    return run.finish()


if __name__ == "__main__":
    launch(main, get_args_parser())
