"""Write final files of a study as small ones to evaluate or to start from: weights, epoch and flags, and nothing else.

    python benchmarks/study/weights.py output_dir/results/NAME/bns-seed0/pretrain_bns_cifar10_if100.pth results/NAME

Several files may be given. Optimiser, history and draw are left out, and flags that name files, folders or the device.
"""
import sys
from pathlib import Path

import torch

OF_A_MACHINE = ("output_dir", "log_dir", "data_root", "resume", "encoder", "eval", "device")


def main(*files, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        target = folder / path.name
        if target.exists():
            raise SystemExit(f"found {target}, expected none: delete it first, if it is to be replaced")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        flags = {name: value for name, value in checkpoint["args"].items() if name not in OF_A_MACHINE}
        torch.save({"model": checkpoint["model"], "epoch": checkpoint["epoch"], "args": flags}, target)
        print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    *files, folder = map(Path, sys.argv[1:])
    main(*files, folder=folder)
