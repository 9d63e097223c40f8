r"""Stage 2 on CIFAR-100-LT: fine-tune the features of stage 1 on subsets drawn by IP-DPP.

    python main_cifar100_finetune_ipdpp.py --imbalanced_factor 100 --data_root /mnt/data/cifar100 \
        --resume output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth

With --eval FILE it evaluates a fine-tuned checkpoint instead. Without --resume it starts from a random encoder;
with --ipdpp_sampler none besides, it is plain cross-entropy training.
"""
from engine import train_classifier
from util.options import Unset, finetune_parser, launch


def get_args_parser():
    parser = finetune_parser(__doc__)
    parser.set_defaults(
        stage="finetune_ipdpp", dataset="cifar100", num_classes=100, data_root="/mnt/data/cifar100", model="resnet34",
        output_dir="./output_dir/cifar100/finetune_ipdpp_cifar100",
        epochs=100, batch_size=64, warmup_epochs=Unset(5), num_samples=50, sampling_freq=20, jitter_strength=1.0,
        save_freq=5, seed=42)
    return parser


def main(args):
    return train_classifier(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
