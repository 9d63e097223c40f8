r"""Linear probing on CIFAR-100-LT: train a linear layer on the frozen features of stage 1.

    python main_cifar100_lineprob_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar100 \
        --resume output_dir/cifar100/pretrain_bns_cifar100/pretrain_bns_cifar100_if100.pth

With --eval FILE it evaluates a probed checkpoint instead. Without --resume it probes a random encoder.
"""
from engine import train_classifier
from util.options import Unset, classifier_parser, launch


def get_args_parser():
    parser = classifier_parser(__doc__)
    parser.set_defaults(
        stage="lineprob_bns", dataset="cifar100", num_classes=100, data_root="/mnt/data/cifar100", model="resnet34",
        output_dir="./output_dir/cifar100/lineprob_bns_cifar100",
        epochs=100, batch_size=64, warmup_epochs=Unset(5), num_samples=50, jitter_strength=1.0,
        save_freq=5, seed=42)
    return parser


def main(args):
    return train_classifier(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
