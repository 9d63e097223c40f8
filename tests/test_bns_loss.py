import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from util.bns_loss import BNSLoss

FORMS = ("published", "eq12")


def batch(num_images, num_labels, dim=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    emb_i, emb_j = (
        torch.randn(num_images, dim, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)
    )
    return emb_i, emb_j, torch.randint(num_labels, (num_images,), generator=generator)


def log_sigmoid(x):
    return -torch.logaddexp(torch.zeros_like(x), -x)


def unit(vector):
    return vector / torch.sqrt((vector * vector).sum())


def published_by_loops(emb_i, emb_j, labels, temperature):
    rows = [unit(row) for row in [*emb_i, *emb_j]]
    labels = labels.tolist() * 2
    total = 0.0
    for a, anchor in enumerate(rows):
        positives, negatives = [], []
        for b, other in enumerate(rows):
            if b != a:
                (positives if labels[b] == labels[a] else negatives).append(torch.exp(anchor @ other / temperature))
        total = total + log_sigmoid(sum(positives) / len(positives))
        total = total + log_sigmoid(-sum(negatives, anchor.new_zeros(())) / len(rows))
    return -total / len(rows)


def eq12_by_loops(emb_i, emb_j, labels, temperature, num_extra):
    q, v, labels = [unit(row) for row in emb_i], [unit(row) for row in emb_j], labels.tolist()
    total = 0.0
    for i, label in enumerate(labels):
        following = [k % len(labels) for k in range(i + 1, i + len(labels))]
        anchors = [i] + [k for k in following if labels[k] == label][:num_extra]
        for a in anchors:
            term = log_sigmoid(q[a] @ v[i] / temperature)
            for j in range(len(labels)):
                if labels[j] != label:
                    term = term + log_sigmoid(-q[a] @ v[j] / temperature)
            total = total - term / len(anchors)
    return total / len(labels)


def by_loops(form, emb_i, emb_j, labels, temperature=0.5, num_extra=4):
    if form == "published":
        return published_by_loops(emb_i, emb_j, labels, temperature)
    return eq12_by_loops(emb_i, emb_j, labels, temperature, num_extra)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "num_images, num_labels, temperature, num_extra",
    [(1, 1, 0.5, 4), (2, 1, 0.5, 4), (2, 9, 0.5, 4), (12, 3, 0.5, 4), (23, 4, 0.2, 2), (9, 1, 0.5, 3), (14, 3, 1.0, 0)],
)
def test_loss_and_gradient_are_those_of_the_formula(form, num_images, num_labels, temperature, num_extra):
    emb_i, emb_j, labels = batch(num_images, num_labels)
    loss = BNSLoss(temperature, form, num_extra)(emb_i, emb_j, labels)
    expected = by_loops(form, emb_i, emb_j, labels, temperature, num_extra)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    gradients = torch.autograd.grad(loss, (emb_i, emb_j))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (emb_i, emb_j)), atol=1e-9, rtol=0)


def clusters(num_images, num_labels, num_outliers=16, dim=128, seed=0):
    """Float32 features close to the centre of their label; the first images are outliers, each of its own label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_labels, (num_images,), generator=generator)
    centres = torch.randn(num_labels, dim, generator=generator)
    emb = centres[labels] + 0.2 * torch.randn(2, num_images, dim, generator=generator)
    emb[:, :num_outliers] = torch.randn(2, num_outliers, dim, generator=generator)
    labels[:num_outliers] = num_labels + torch.arange(num_outliers)
    return emb, labels


def published_by_masks(emb, labels, temperature):
    rows, labels = torch.cat((*emb / emb.norm(dim=-1, keepdim=True),)), labels.repeat(2)
    similarity = torch.exp(rows @ rows.T / temperature)
    is_negative = labels[:, None] != labels
    is_positive = ~is_negative & ~torch.eye(len(rows), dtype=torch.bool)
    positive = (similarity * is_positive).sum(1) / is_positive.sum(1)
    negative = (similarity * is_negative).sum(1) / len(rows)
    return -(log_sigmoid(positive) + log_sigmoid(-negative)).mean()


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05, 0.03])
def test_float32_keeps_the_negatives_at_low_temperatures(temperature):
    emb, labels = clusters(512, 10)
    exact = emb.double().requires_grad_()
    expected = published_by_masks(exact, labels, temperature)
    expected.backward()
    loss = BNSLoss(temperature)(*emb.requires_grad_(), labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)
    # Of every image, since outliers have smaller gradients, and theirs hold positives that are not saturated.
    error = (emb.grad - exact.grad).norm(dim=-1) / exact.grad.norm(dim=-1)
    assert error.max() < 1e-5


def test_published_loss_of_two_equal_views_by_hand():
    emb = torch.tensor([[3.0, 0.0]])
    # One image: its only positive is the other view at similarity 1, and it has no negatives.
    expected = -(math.log(1 / (1 + math.exp(-math.exp(1 / 0.5)))) + math.log(0.5))
    assert BNSLoss()(emb, 2 * emb, torch.tensor([7])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [5, 5, 5, 1]])
def test_finite_without_negatives_or_further_positives(form, labels):
    emb_i, emb_j, _ = batch(4, 1, dtype=torch.float32)
    with torch.no_grad():
        emb_i[0] = 0  # a row that cannot be normalised
    loss = BNSLoss(form=form)(emb_i, emb_j, torch.tensor(labels))
    loss.backward()
    assert loss.isfinite() and emb_i.grad.isfinite().all() and emb_j.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    emb_i, emb_j, labels = batch(40, 4, dim=32, dtype=torch.float32)
    expected = BNSLoss(form=form)(emb_i, emb_j, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(BNSLoss(form=form)(emb_i, emb_j, labels), expected)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_embeddings_are_evaluated_in_float32(form):
    emb_i, emb_j, labels = (t.detach() for t in batch(40, 4, dim=32))
    emb_i, emb_j = emb_i.bfloat16(), emb_j.bfloat16()
    loss = BNSLoss(form=form)(emb_i, emb_j, labels)
    assert loss.dtype == torch.float32
    expected = by_loops(form, emb_i.double(), emb_j.double(), labels)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_steps_lower_the_loss(form):
    emb_i, emb_j, labels = batch(32, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD((emb_i, emb_j), lr=1.0)
    losses = []
    for _ in range(20):
        losses.append(BNSLoss(form=form)(emb_i, emb_j, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def run_one_of_two_processes(rank, rendezvous, form, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    shard = [t[rank::2].detach() for t in batch(12, 3)]
    emb_i, emb_j = (t.requires_grad_() for t in shard[:2])
    loss = BNSLoss(form=form)(emb_i, emb_j, shard[2])
    loss.backward()
    torch.save((loss.detach(), emb_i.grad, emb_j.grad), f"{results}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_give_the_loss_and_gradient_of_one(form, tmp_path):
    mp.spawn(run_one_of_two_processes, (tmp_path / "rendezvous", form, tmp_path / "results"), nprocs=2)
    emb_i, emb_j, labels = (torch.cat((t[0::2], t[1::2])).detach() for t in batch(12, 3))  # as the processes hold them
    loss = BNSLoss(form=form)(emb_i.requires_grad_(), emb_j.requires_grad_(), labels)
    loss.backward()
    ranks = [torch.load(f"{tmp_path / 'results'}-{rank}") for rank in range(2)]
    for rank_loss, _, _ in ranks:
        torch.testing.assert_close(rank_loss, loss.detach(), atol=1e-6, rtol=0)
    # DDP averages the gradients over the two processes.
    for expected, shards in zip((emb_i.grad, emb_j.grad), list(zip(*ranks, strict=True))[1:], strict=True):
        torch.testing.assert_close(torch.cat(shards) / 2, expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_gives_the_same_loss_without_synchronising(form):
    emb_i, emb_j, labels = (t.detach() for t in batch(64, 5, dtype=torch.float32))
    expected = BNSLoss(form=form)(emb_i, emb_j, labels)
    cuda = [t.cuda() for t in (emb_i, emb_j, labels)]
    leaves = [t.requires_grad_() for t in cuda[:2]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = BNSLoss(form=form)(*cuda)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, atol=1e-5, rtol=1e-5)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
