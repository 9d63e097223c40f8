"""Kill a run again and again, resume it each time, and compare its end with that of a run left alone.

    python tests/kill_resume.py --kills 20 --stage all

Every kill is a SIGKILL at a random moment: in turn during start-up, amid the writing of a checkpoint, and in an epoch
after that. Takes a few minutes on the CPU. Exit code 1: weights, optimiser state, log.txt or TensorBoard differ.
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent)]

from run_process import STAGES, finish, kill_and_resume  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per stage")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng, found = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        extractor = Path(folder) / "extractor" / "pretrain_bns_cifar10_if100.pth"
        if args.stage != "pretrain_bns":
            finish("pretrain_bns", extractor.parent, "--epochs", 1)
        for stage in STAGES if args.stage == "all" else [args.stage]:
            source = None if stage == "pretrain_bns" else extractor
            different, landed = kill_and_resume(stage, folder, source, args.kills, args.epochs, rng)
            found += different
            if landed < args.kills:
                found.append("too few kills: try more --epochs")
    print("verdict:", "; ".join(found) if found else "weights, optimiser, log.txt and TensorBoard are the same to the "
          "last bit as without kills")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
