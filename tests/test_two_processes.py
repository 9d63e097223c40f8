"""Two processes against figures worked out in a plain loop from the batches that each of them was given."""
import functools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from run_process import outputs, pair
from test_engine import MIN_LR, WEIGHT_DECAY, plain_training

from models import BNSNetwork, Classifier, create_encoder
from util.batches import DeviceLoader
from util.bns_loss import BNSLoss
from util.run.checkpoint import load_checkpoint

FLAGS = ["--epochs", 2, "--warmup_epochs", 1, "--opt", "sgd", "--blr", 0.005, "--min_lr", MIN_LR,
         "--weight_decay", WEIGHT_DECAY]


def note_batches(folder, compiles):
    """For `prepare`: save the batches of this process in each epoch. torch.compile gives back what it was given."""
    original, epochs = DeviceLoader.epoch, []

    def noted(*args):
        epochs.append([])
        for views, labels in original(*args):
            epochs[-1].append((views, labels))
            torch.save(epochs, folder / f"batches{os.environ['RANK']}.pt")
            yield views, labels
    DeviceLoader.epoch = noted
    if compiles:
        torch.compile = lambda network, **_: network


@pytest.mark.slow
@pytest.mark.parametrize("stage, images, compiles", [("pretrain_bns", 40, False), ("finetune_ipdpp", 20, True)])
def test_two_processes_train_as_worked_out_by_hand(stage, images, compiles, tmp_path):
    flags = [*FLAGS, "--batch_size", images // 2, *["--compile"] * compiles]
    outputs(*pair(stage, tmp_path / "run", *flags, prepare=functools.partial(note_batches, tmp_path, compiles)))
    trained = load_checkpoint(tmp_path / "run" / f"{stage}_cifar10_if100.pth")
    history = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    shares = [torch.load(tmp_path / f"batches{rank}.pt") for rank in (0, 1)]
    epochs = [list(zip(*of_both, strict=True)) for of_both in zip(*shares, strict=True)]
    epochs = epochs[-2:]  # stage 1 shows some views before its first epoch

    torch.manual_seed(trained["args"]["seed"])
    encoder = create_encoder("test_resnet")
    model = BNSNetwork(encoder) if stage == "pretrain_bns" else Classifier(encoder, 10)
    model.to(memory_format=torch.channels_last)

    def loss_of(*batches):
        """Of the batches of both processes. Batch norm keeps the statistics of the first process only."""
        (first, first_labels), (second, second_labels) = batches
        one = model(*first)
        statistics = {name: value.clone() for name, value in model.named_buffers()}
        two = model(*second)
        for name, value in model.named_buffers():
            value.data.copy_(statistics[name])
        if stage == "pretrain_bns":  # of the rows of both together
            return BNSLoss()(*map(torch.cat, zip(one, two, strict=True)), torch.cat((first_labels, second_labels)))
        return (F.cross_entropy(one, first_labels) + F.cross_entropy(two, second_labels)) / 2

    lr = 0.005 * images / 256
    losses, rates = plain_training(model, epochs, loss_of, lr, sgd=True)
    assert [record["train_loss"] for record in history] == pytest.approx(losses, abs=1e-4)
    assert [record["train_lr"] for record in history] == pytest.approx(rates, rel=1e-6)
    assert [record["train_images"] for record in history] == [
        sum(len(labels) for batch in batches for _, labels in batch) for batches in epochs]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained["model"][name], value, rtol=1e-3, atol=3e-5, msg=name)
