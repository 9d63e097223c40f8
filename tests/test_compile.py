"""What --compile does with an epoch whose last batch is smaller, by a backend that compiles nothing."""
import functools

import pytest
import torch
from conftest import run

import main_cifar10_finetune_ipdpp as finetune
import main_cifar10_pretrain_bns as pretrain


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, sizes", [(finetune, ["--num_samples", 10], [25, 8]), (pretrain, [], [25])])
def test_each_batch_size_has_a_graph_of_its_own(script, flags, sizes, few_images, tmp_path, monkeypatch):
    graphs = []  # for each, the batch sizes that it ran on

    def backend(graph, inputs):
        ran_on = []
        graphs.append(ran_on)

        def forward(*values):
            ran_on.extend(value.shape[0] for value in values
                          if isinstance(value, torch.Tensor) and value.shape[1:] == (3, 16, 16))
            return graph(*values)
        return forward

    plain = run(script, tmp_path / "plain", "--epochs", 3, "--batch_size", 25, *flags)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    compiled = run(script, tmp_path / "compiled", "--epochs", 3, "--batch_size", 25, "--compile", *flags)
    assert [set(ran_on) for ran_on in graphs] == [{size} for size in sizes]
    assert [record["train_loss"] for record in compiled] == pytest.approx(
        [record["train_loss"] for record in plain], rel=1e-4)
