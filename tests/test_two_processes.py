"""Two processes against figures worked out in a plain loop from the batches that each of them was given."""
import functools
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from test_processes import finish, pair

from models import BNSNetwork, Classifier, create_encoder
from util.batches import EpochBatches
from util.bns_loss import BNSLoss
from util.run.checkpoint import load_checkpoint

FLAGS = ["--epochs", 1, "--warmup_epochs", 0, "--opt", "sgd", "--blr", 0.4, "--weight_decay", 0.1]


def note_batches(folder, compiles):
    """For `prepare`: save each batch of this process. torch.compile gives back what it was given."""
    iterate = EpochBatches.__iter__

    def noted(self):
        batches = []
        for views, labels in iterate(self):
            batches.append((views, labels))
            torch.save(batches, folder / f"batches{os.environ['RANK']}.pt")
            yield views, labels
    EpochBatches.__iter__ = noted
    if compiles:
        torch.compile = lambda network, **_: network


def backward(model, batches, loss_of, share):
    """Gradients of the batches of both processes. Batch norm keeps the statistics of the first process only."""
    first = model(*batches[0][0])
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    second = model(*batches[1][0])
    for name, value in model.named_buffers():
        value.data.copy_(statistics[name])
    loss = loss_of((first, second), [labels for _, labels in batches])
    (loss / share).backward()
    return loss.item()


def bns_loss(outputs, labels):
    """Of the rows of both processes together."""
    first, second = (torch.cat(views) for views in zip(*outputs, strict=True))
    return BNSLoss()(first, second, torch.cat(labels))


def mean_cross_entropy(outputs, labels):
    return sum(map(F.cross_entropy, outputs, labels)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("stage, images, accum_iter, compiles", [("pretrain_bns", 40, 1, False),
                                                                 ("finetune_ipdpp", 20, 2, True)])
def test_two_processes_train_as_worked_out_by_hand(stage, images, accum_iter, compiles, tmp_path):
    flags = [*FLAGS, "--batch_size", images // 2, "--accum_iter", accum_iter, *["--compile"] * compiles]
    finish(*pair(stage, tmp_path / "run", *flags, prepare=functools.partial(note_batches, tmp_path, compiles)))
    trained = load_checkpoint(tmp_path / "run" / f"{stage}_cifar10_if100.pth")
    record, = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    shares = [torch.load(tmp_path / f"batches{rank}.pt") for rank in (0, 1)]

    torch.manual_seed(trained["args"]["seed"])
    encoder = create_encoder("test_resnet", 16)
    model = BNSNetwork(encoder) if stage == "pretrain_bns" else Classifier(encoder, 10)
    model.to(memory_format=torch.channels_last)
    decayed = [{"params": [p for p in model.parameters() if (p.ndim > 1) == heavy], "weight_decay": 0.1 * heavy}
               for heavy in (True, False)]
    optimizer = torch.optim.SGD(decayed, momentum=0.9, nesterov=True, lr=1.0)
    steps, losses = list(zip(*shares, strict=True)), []
    updates = [steps[i:i + accum_iter] for i in range(0, len(steps), accum_iter)]
    loss_of = bns_loss if stage == "pretrain_bns" else mean_cross_entropy
    for number, update in enumerate(updates):
        for group in optimizer.param_groups:
            lr = 0.4 * images * accum_iter / 256
            group["lr"] = lr * (1 + math.cos(math.pi * number / len(updates))) / 2
        optimizer.zero_grad()
        losses += [backward(model, batches, loss_of, len(update)) for batches in update]
        optimizer.step()
    assert len(updates) > 1 and record["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert record["train_images"] == sum(len(labels) for share in shares for _, labels in share)
    assert record["train_lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained["model"][name], value, rtol=1e-3, atol=1e-5, msg=name)
