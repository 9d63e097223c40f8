r"""Linear probing on CIFAR-10-LT: train a linear layer on the frozen features of stage 1.

    python main_cifar10_lineprob_bns.py --imbalanced_factor 100 --data_root /mnt/data/cifar10 \
        --resume output_dir/cifar10/pretrain_bns_cifar10/pretrain_bns_cifar10_if100.pth

With --eval FILE it evaluates a probed checkpoint instead. Without --resume it probes a random encoder.
"""
from engine import train_classifier
from util.options import Unset, classifier_parser, launch


def get_args_parser():
    parser = classifier_parser(__doc__)
    parser.set_defaults(
        stage="lineprob_bns", dataset="cifar10", num_classes=10, data_root="/mnt/data/cifar10", model="resnet18",
        output_dir="./output_dir/cifar10/lineprob_bns_cifar10",
        epochs=100, batch_size=64, warmup_epochs=Unset(20), num_samples=100, jitter_strength=2.0,
        save_freq=1, seed=0)
    return parser


def main(args):
    return train_classifier(args)


if __name__ == "__main__":
    launch(main, get_args_parser())
