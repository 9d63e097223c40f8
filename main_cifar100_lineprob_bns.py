r"""Linear probing on CIFAR-100-LT: train a linear layer on the frozen features of stage 1.

    python main_cifar100_lineprob_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar100 \
        --resume output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth

The recipe is that of main_cifar10_lineprob_bns.py, with its defaults but for those below.
"""
from main_cifar10_lineprob_bns import get_args_parser as cifar10_parser, main
from util.run.options import launch


def get_args_parser():
    parser = cifar10_parser()
    parser.description = __doc__
    parser.set_defaults(
        dataset="cifar100", data_root="/mnt/data/cifar100", num_classes=100, model="resnet34",
        output_dir="./output_dir/cifar100/lineprob_bns_cifar100",
        num_samples=50, jitter_strength=1.0, warmup_epochs=5, seed=42)
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
