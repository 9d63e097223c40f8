"""What stage 2 draws, trains on and says of its draws, against brute force and figures worked out anew."""
import numpy as np
import pytest
import torch
from conftest import run
from test_ip_dpp import brute_force

import main_cifar10_finetune_ipdpp as finetune
from util.batches import DeviceLoader
from util.ip_dpp import draw_subset, inclusion_probabilities


@pytest.mark.parametrize("kernel", ["paper", "published"])
def test_each_class_is_drawn_by_the_probabilities_of_its_own_images(kernel):
    """What is hard in one class is easy in the other, and the classes are mixed in the data set."""
    targets = np.array([0, 1] * 6 + [2])
    log_p = np.log(np.where(np.arange(13) < 6, [0.02, 0.99] * 6 + [0.5], [0.99, 0.02] * 6 + [0.5]))
    draws = 2000
    drawn = torch.cat([draw_subset(log_p, targets, 2, (0, redraw), "exact", kernel) for redraw in range(draws)])
    observed = np.bincount(drawn.numpy(), minlength=13) / draws
    for c in (0, 1):
        members = np.flatnonzero(targets == c)
        _, _, expected = brute_force(log_p[members], 2, kernel)
        assert np.abs(observed[members] - expected).max() < 4.5 * np.sqrt(0.25 / draws)
        assert kernel == "published" or np.ptp(expected) > 0.1  # or draws by another class's images would pass too
    assert observed[12] == 1


@pytest.fixture
def watched(monkeypatch):
    """(draws, trained on): arguments and result of each draw of a run, and the images of each epoch."""
    draws, epochs, indices = [], [], DeviceLoader.indices

    def draw(*args):
        draws.append((*args, draw_subset(*args)))
        return draws[-1][-1]

    def indices_noted(*args):
        epochs.append(torch.cat(indices(*args)).tolist())
        return indices(*args)

    monkeypatch.setattr(finetune, "draw_subset", draw)
    monkeypatch.setattr(DeviceLoader, "indices", indices_noted)
    return draws, epochs


@pytest.mark.parametrize("kernel", ["paper", "published"])
def test_epochs_train_on_the_last_draw_and_the_log_describes_it(kernel, watched, few_images, tmp_path):
    draws, epochs = watched
    history = run(finetune, tmp_path, "--epochs", 6, "--sampling_freq", 2, "--num_samples", 15, "--batch_size", 20,
                  "--blr", 0.2, "--warmup_epochs", 0, "--ipdpp_kernel", kernel)
    subsets = [draw[-1].tolist() for draw in draws]
    drawn = [subsets[number] for number in (0, 1, 1, 2, 2, 2)]  # new before epochs 1 and 3, not 5
    assert [sorted(order) for order in epochs] == [sorted(subset) for subset in drawn]
    assert epochs[1] != epochs[2]  # each epoch in an order of its own
    assert len(set(map(tuple, subsets))) == 3
    records = [record["drawn"] for record in history if "drawn" in record]
    for number, (draw, record) in enumerate(zip(draws, records, strict=True)):
        log_p, targets, subset = np.asarray(draw[0]), np.asarray(draw[1]), subsets[number]
        assert [figures["class"] for figures in record] == [0, 1, 2]  # those of more than 15 images
        for figures in record:
            members = np.flatnonzero(targets == figures["class"])
            taken = np.isin(members, subset)
            inclusion = inclusion_probabilities(log_p[members], 15, kernel)
            p = np.exp(log_p[members])
            expected = {"mean_p": p.mean(), "drawn_mean_p": p[taken].mean(), "left_mean_p": p[~taken].mean(),
                        "max_inclusion": inclusion.max(), "min_inclusion": inclusion.min()}
            if number:
                expected["changed"] = len(set(members[taken]) - set(subsets[number - 1]))
            assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
            assert ("changed" in figures) == bool(number)
