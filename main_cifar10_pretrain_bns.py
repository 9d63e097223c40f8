"""Stage 1 on CIFAR-10-LT: pretrain a ResNet-18 feature extractor with Balanced Negative Sampling.

    python main_cifar10_pretrain_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar10

The last epoch also writes pretrain_bns_cifar10_if<factor>.pth, which the later stages take as --resume.
"""
from engine import pretrain
from util.options import Unset, pretrain_parser, launch


def get_args_parser():
    parser = pretrain_parser(__doc__)
    parser.set_defaults(
        stage="pretrain_bns", dataset="cifar10", num_classes=10, data_root="/mnt/data/cifar10", model="resnet18",
        output_dir="./output_dir/cifar10/pretrain_bns_cifar10",
        epochs=1000, batch_size=1024, warmup_epochs=Unset(20), jitter_strength=2.0,
        save_freq=50, seed=0)
    return parser


def main(args):
    return pretrain(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
