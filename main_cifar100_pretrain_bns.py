"""Stage 1 on CIFAR-100-LT: pretrain a ResNet-34 feature extractor with Balanced Negative Sampling.

    python main_cifar100_pretrain_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar100

The recipe is that of main_cifar10_pretrain_bns.py, with its defaults but for those below.
"""
from main_cifar10_pretrain_bns import get_args_parser as cifar10_parser, main
from util.run.options import launch


def get_args_parser():
    parser = cifar10_parser()
    parser.description = __doc__
    parser.set_defaults(
        dataset="cifar100", data_root="/mnt/data/cifar100", num_classes=100, model="resnet34",
        output_dir="./output_dir/cifar100/pretrain_bns_cifar100", batch_size=512)
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
