"""Stage 1 on CIFAR-10-LT: pretrain a ResNet-18 feature extractor with Balanced Negative Sampling.

    python main_cifar10_pretrain_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar10

Two random views of each image pass the encoder and a projector. The loss pulls projections of the same class together
and pushes those of different classes apart. Every --eval_freq epochs a k-nearest-neighbour classifier, with the
training images as neighbours of the test images, shows how good the encoder's features have become. The last epoch also
writes pretrain_bns_cifar10_if<factor>.pth. The later stages take it as --resume, and drop the projector.

With --eval FILE it prints that classifier's accuracy for the encoder of any checkpoint instead.
"""
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from engine import evaluate_knn, load_data, train_one_epoch, warm_up_then_cosine
from models import BNSNetwork, create_encoder
from util.augment import create_augment
from util.batches import DeviceLoader
from util.bns_loss import BNSLoss
from util.run import Run
from util.run.checkpoint import load_encoder
from util.run.options import Parser, launch


def get_args_parser():
    parser = Parser(__doc__, ["data", "model", "balanced negative sampling", "optimisation", "run"])
    parser.set_defaults(
        stage="pretrain_bns", dataset="cifar10",
        # data and augmentation; the published code takes the strength of the jitter from its --num_views, which is 2
        data_root="/mnt/data/cifar10", imbalanced_factor=100, num_classes=10, input_size=32,
        augment="simclr", min_crop=0.08, jitter_strength=2.0,
        # model and loss: that of the published code, or "eq12" with m = num_extra_positives
        model="resnet18", embed_dim=128, temperature=0.5, bns_form="published", num_extra_positives=4,
        # optimisation: AdamW (or SGD), linear warm-up to blr * (images per step) / 256, then half a cosine
        epochs=1000, batch_size=1024, blr=1e-3, min_lr=0.0, warmup_epochs=20, weight_decay=0.05,
        opt="adamw", amp="auto", seed=0,
        # run
        output_dir="./output_dir/cifar10/pretrain_bns_cifar10", eval_freq=25, save_freq=50, keep_checkpoints=3,
        device="auto")
    return parser


def main(args):
    with Run(args) as run:
        return pretrain(args, run)


def pretrain(args, run):
    train_set, test_set = load_data(run)

    torch.manual_seed(args.seed)
    model = BNSNetwork(create_encoder(args.model), args.embed_dim)
    model.to(run.device, memory_format=torch.channels_last)
    criterion = BNSLoss(args.temperature, args.bns_form, args.num_extra_positives)

    if args.eval:
        load_encoder(model.enc, run.evaluated, f"--eval {args.eval}")
        return evaluate_knn(model.enc, train_set, test_set, run)

    # Two views of each image; an epoch's incomplete last batch is left out.
    augment = create_augment(args.augment, args.input_size, args.jitter_strength, args.min_crop)
    loader = DeviceLoader(train_set, augment, run.processes, args.batch_size, args.seed,
                          views_per_image=2, drop_last=True)
    all_indices = torch.arange(len(train_set))
    steps = len(loader.batch_sizes(len(all_indices)))

    lr = args.lr or args.blr * args.batch_size * run.processes.world_size / 256
    groups = param_groups_weight_decay(model, args.weight_decay)  # weights decay, biases and norms do not
    optimizer = create_optimizer_v2(groups, args.opt, lr, momentum=0.9, betas=(0.9, 0.95), fused=True)
    scheduler = warm_up_then_cosine(optimizer, args.epochs, args.warmup_epochs, args.min_lr, steps)

    network = run.begin(model, optimizer, steps)  # loads --resume, locks the output folder, wraps for DDP and --compile
    if run.start_epoch == 0:
        (first, second), _ = next(loader.epoch(0, all_indices))
        views = torch.stack((first[:32], second[:32]), dim=1).flatten(0, 1)
        run.log.images("input/two views of each image, side by side", views.cpu(), 0)
    for epoch in run.epochs():
        batches = loader.epoch(epoch, all_indices)
        stats = train_one_epoch(network, criterion, batches, optimizer, scheduler, epoch, run)
        if run.evaluates(epoch):
            stats |= evaluate_knn(model.enc, train_set, test_set, run)
        run.end_epoch(epoch, stats)  # writes log.txt and, if it is time, a checkpoint
    return run.finish()


if __name__ == "__main__":
    launch(main, get_args_parser())
