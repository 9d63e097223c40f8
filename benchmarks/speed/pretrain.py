"""Views per second of whole training steps, data included, against the plain pipeline on the same images.

    python benchmarks/speed/pretrain.py [--stage 2] [--data_root FOLDER_OF_CIFAR-10] [--profile] [flags of the script]

Ours is main_cifar10_pretrain_bns.py itself, stopped after some steps (stage 2: main_cifar10_finetune_ipdpp.py on all
images). Flags that are not of this script go to it, such as --compile or --amp float16. The plain pipeline is what is
usually written: torchvision's transforms on PIL images in loader workers, contiguous float32 (float16 on CUDA), the
loss broadcast to (2N, 2N, D) and read in every step. Times are medians of several blocks of steps, after a first one.
Memory is that of a pipeline with its data, without the workers'.
"""
import argparse
import itertools
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import main_cifar10_finetune_ipdpp  # noqa: E402
import main_cifar10_pretrain_bns  # noqa: E402
from benchmarks.speed.augment import PIL_PIPELINES, load_pixels  # noqa: E402
from benchmarks.speed.bns_loss import broadcast_loss  # noqa: E402
from benchmarks.speed.timer import PeakMemory, median_seconds  # noqa: E402
from models import BNSNetwork, Classifier, create_encoder  # noqa: E402
from util.batches import DeviceLoader  # noqa: E402


def ours(options, measure):
    """The result of `measure(train)`, which the script of the stage calls in place of its first epoch.

    `train()` does a block of steps, by the script's own train_one_epoch.
    """
    script = main_cifar10_pretrain_bns if options.stage == 1 else main_cifar10_finetune_ipdpp
    train_one_epoch, one_epoch, results = script.train_one_epoch, DeviceLoader.epoch, []

    def endless(loader, epoch, subset):
        return itertools.chain.from_iterable(one_epoch(loader, number, subset) for number in itertools.count(epoch))

    def measured(network, criterion, batches, *rest):
        block = partial(itertools.islice, batches, options.steps)  # the next batches, as many as a block has
        results.append(measure(lambda: train_one_epoch(network, criterion, block(), *rest)))
        raise SystemExit  # of the script

    flags = ["--model", options.model, "--batch_size", str(options.batch_size), "--device", options.device]
    flags += ["--imbalanced_factor", "1", *(["--ipdpp_sampler", "none"] if options.stage == 2 else [])]
    flags += ["--data_root", options.data_root] if options.data_root else ["--toy_data"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        args = script.get_args_parser().parse_args([*flags, "--output_dir", folder, *options.flags])
        with mock.patch.object(script, "train_one_epoch", measured), \
                mock.patch.object(DeviceLoader, "epoch", endless), suppress(SystemExit):
            script.main(args)
    return results[0]


def collate(views, images):
    """A batch of views and labels, as a worker makes it of pairs of pixels and label."""
    return default_collate([(*(PIL_PIPELINES["simclr"](Image.fromarray(pixels)) for _ in range(views)), label)
                            for pixels, label in images])


def plain(options, measure):
    """What `measure(train)` returns for the plain pipeline."""
    cuda, images = options.device == "cuda", list(zip(*load_pixels(options.data_root), strict=True))
    torch.backends.cudnn.benchmark = True
    encoder = create_encoder(options.model)
    model = (BNSNetwork(encoder) if options.stage == 1 else Classifier(encoder, 10)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    scaler = torch.amp.GradScaler(options.device, enabled=cuda)
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=True, pin_memory=cuda,
                        num_workers=os.cpu_count(), persistent_workers=True, collate_fn=partial(collate, options.views))
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def train():
        for batch in itertools.islice(endless, options.steps):
            *views, labels = (part.to(options.device, non_blocking=True) for part in batch)
            optimizer.zero_grad()
            with torch.autocast(options.device, torch.float16, enabled=cuda):
                outputs = model(*views)
                loss = broadcast_loss(*outputs, labels) if options.stage == 1 else F.cross_entropy(outputs, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss.item()

    return measure(train)


def main(options):
    def time_of_a_step(train):
        return median_seconds(train, options.blocks, options.device, clock=time.perf_counter) / options.steps

    def profile(train):
        train()
        with torch.profiler.profile(acc_events=True) as profiler:
            train()
        return profiler.key_averages()

    if options.profile:
        sort_by = f"self_{options.device}_time_total"
        return print(ours(options, profile).table(sort_by, row_limit=25, max_name_column_width=60))
    views, seconds = options.views * options.batch_size, []
    print(f"{'':6} {'ms a step':>11} {'views/s':>10} {'peak MiB':>10}")
    for pipeline in (plain, ours):
        memory = PeakMemory(options.device)
        seconds.append(pipeline(options, time_of_a_step))
        print(f"{pipeline.__name__:6} {seconds[-1] * 1e3:11,.1f} {views / seconds[-1]:10,.1f} "
              f"{memory.bytes() / 2**20:10,.0f}", flush=True)
    print(f"ours is {seconds[0] / seconds[1]:.1f} times as fast")


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--stage", type=int, choices=[1, 2], default=1)
    parser.add_argument("--data_root", help="folder of CIFAR-10, else toy images are drawn")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch_size", type=int, help="unset: the script's; on the CPU, 512 in stage 1")
    parser.add_argument("--steps", type=int, help="of a block; in stage 2 a multiple of 16, which it augments at once")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of our steps and stop")
    options, options.flags = parser.parse_known_args()
    options.device, options.blocks = ("cuda", 7) if cuda else ("cpu", 3)
    options.views = {1: 2, 2: 1}[options.stage]  # of an image
    options.batch_size = options.batch_size or {1: 1024 if cuda else 512, 2: 64}[options.stage]
    options.steps = options.steps or {1: 10 if cuda else 1, 2: 64 if cuda else 16}[options.stage]
    main(options)
