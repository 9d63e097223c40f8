r"""Stage 2 on CIFAR-100-LT: fine-tune the features of stage 1 on subsets drawn by IP-DPP.

    python main_cifar100_finetune_ipdpp.py --imbalanced_factor 100 --data_root /mnt/data/cifar100 \
        --resume output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth

The recipe is that of main_cifar10_finetune_ipdpp.py, with its defaults but for those below. New draws come before
epochs 19, 39, 59 and 79.
"""
from main_cifar10_finetune_ipdpp import get_args_parser as cifar10_parser, main
from util.run.options import launch


def get_args_parser():
    parser = cifar10_parser()
    parser.description = __doc__
    parser.set_defaults(
        dataset="cifar100", data_root="/mnt/data/cifar100", num_classes=100, model="resnet34",
        output_dir="./output_dir/cifar100/finetune_ipdpp_cifar100",
        num_samples=50, sampling_freq=20)
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
