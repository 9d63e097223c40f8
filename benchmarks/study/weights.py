"""Write the final file of a run as a small one to evaluate or to start from: weights, epoch and flags, nothing else.

    python benchmarks/study/weights.py output_dir/results/NAME/bns-seed0/pretrain_bns_cifar10_if100.pth \\
        results/NAME/pretrain_bns_cifar10_if100.pth

Optimiser, history and draw are left out, and flags that name files, folders or the device.
"""
import sys

import torch

OF_A_MACHINE = ("output_dir", "log_dir", "data_root", "resume", "encoder", "eval", "device")


def export(source, target):
    """Write the small copy of `source` to `target`, both paths."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    flags = {name: value for name, value in checkpoint["args"].items() if name not in OF_A_MACHINE}
    torch.save({"model": checkpoint["model"], "epoch": checkpoint["epoch"], "args": flags}, target)


if __name__ == "__main__":
    export(*sys.argv[1:])
