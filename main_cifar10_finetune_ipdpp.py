r"""Stage 2 on CIFAR-10-LT: fine-tune the features of stage 1 on subsets drawn by IP-DPP.

    python main_cifar10_finetune_ipdpp.py --imbalanced_factor 100 --data_root /mnt/data/cifar10 \
        --resume output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth

With --eval FILE it evaluates a fine-tuned checkpoint instead. Without --resume it starts from a random encoder;
with --ipdpp_sampler none besides, it is plain cross-entropy training.
"""
from engine import train_classifier
from util.options import Unset, finetune_parser, launch


def get_args_parser():
    parser = finetune_parser(__doc__)
    parser.set_defaults(
        stage="finetune_ipdpp", dataset="cifar10", num_classes=10, data_root="/mnt/data/cifar10", model="resnet18",
        output_dir="./output_dir/cifar10/finetune_ipdpp_cifar10",
        epochs=100, batch_size=64, warmup_epochs=Unset(5), num_samples=500, sampling_freq=10, jitter_strength=1.0,
        save_freq=1, seed=42)
    return parser


def main(args):
    return train_classifier(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
