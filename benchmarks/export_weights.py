"""Write final files of a study as small ones to evaluate or to start from: weights, epoch and flags, and nothing else.

    python benchmarks/export_weights.py output_dir/results/NAME/bns-seed0/pretrain_bns_cifar10_if100.pth \\
        output_dir/results/NAME/bns-probe-seed42/lineprob_bns_cifar10_if100.pth \\
        output_dir/results/NAME/bns-ipdpp-seed42/finetune_ipdpp_cifar10_if100.pth results/NAME

The copies keep their names. Optimiser, history and draw are left out, and flags that name a file, folder or device of
the machine they were trained on.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from util.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.options import launch  # noqa: E402

OF_A_MACHINE = ("output_dir", "log_dir", "data_root", "resume", "eval", "device")


def main(args):
    if args.folder.is_file():
        raise UserError(f"FOLDER: found {args.folder}, which is a file, expected a folder as the last argument")
    small = {}
    for path in args.files:
        checkpoint = load_checkpoint(path, "FILE")
        flags = {name: value for name, value in checkpoint["args"].items() if name not in OF_A_MACHINE}
        if not path.name.startswith(f"{flags.get('stage')}_{flags.get('dataset')}_if"):
            raise UserError(f"FILE: found {path.name}, expected a final file, <stage>_<dataset>_if<factor>.pth")
        target = args.folder / path.name
        if target.exists():
            raise UserError(f"FOLDER: {args.folder} holds a {path.name} already, expected none")
        small[target] = {"model": checkpoint["model"], "epoch": checkpoint.get("epoch"), "args": flags}
    args.folder.mkdir(parents=True, exist_ok=True)  # all files are good
    for target, state in small.items():
        save_checkpoint(state, target)
        print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="final files of runs")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the small ones go")
    launch(main, parser)
