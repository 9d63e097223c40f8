"""The loss of stage 1 against its formulas, written again with loops."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from util.bns_loss import BNSLoss


def batch(num_images, num_labels, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    emb_i, emb_j = torch.randn(2, num_images, dim, generator=generator, dtype=dtype)
    return emb_i.requires_grad_(), emb_j.requires_grad_(), torch.randint(num_labels, (num_images,), generator=generator)


def published_by_loops(emb_i, emb_j, labels, temperature=0.5, _=None):
    rows, labels = F.normalize(torch.cat((emb_i, emb_j))), labels.repeat(2)
    total = 0.0
    for number, (anchor, label) in enumerate(zip(rows, labels, strict=True)):
        similarity = torch.exp(rows @ anchor / temperature)
        is_positive, is_negative = labels == label, labels != label
        is_positive[number] = False
        total = total + F.logsigmoid(similarity[is_positive].mean())
        total = total + F.logsigmoid(-similarity[is_negative].sum() / len(rows))
    return -total / len(rows)


def eq12_by_loops(emb_i, emb_j, labels, temperature=0.5, num_extra=4):
    q, v, labels = F.normalize(emb_i), F.normalize(emb_j), labels.tolist()
    total = 0.0
    for i, label in enumerate(labels):
        following = [k % len(labels) for k in range(i + 1, i + len(labels))]
        anchors = [i] + [k for k in following if labels[k] == label][:num_extra]
        for a in anchors:
            term = F.logsigmoid(q[a] @ v[i] / temperature)
            for j in range(len(labels)):
                if labels[j] != label:
                    term = term + F.logsigmoid(-q[a] @ v[j] / temperature)
            total = total - term / len(anchors)
    return total / len(labels)


FORMS = {"published": published_by_loops, "eq12": eq12_by_loops}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "num_images, num_labels, temperature, num_extra",
    [(1, 1, 0.5, 4), (2, 1, 0.5, 4), (2, 9, 0.5, 4), (12, 3, 0.5, 4), (23, 4, 0.2, 2), (9, 1, 0.5, 3), (14, 3, 1.0, 0)],
)
def test_loss_and_gradient_are_those_of_the_formula(form, num_images, num_labels, temperature, num_extra):
    emb_i, emb_j, labels = batch(num_images, num_labels)
    loss = BNSLoss(temperature, form, num_extra)(emb_i, emb_j, labels)
    expected = FORMS[form](emb_i, emb_j, labels, temperature, num_extra)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    gradients = torch.autograd.grad(loss, (emb_i, emb_j))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (emb_i, emb_j)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float32_under_autocast_too(form, dtype):
    emb_i, emb_j, labels = batch(40, 4, dim=32, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = BNSLoss(form=form)(emb_i, emb_j, labels)
    assert loss.dtype == torch.float32
    expected = FORMS[form](emb_i.double(), emb_j.double(), labels)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.03])
def test_float32_keeps_the_negatives_at_low_temperatures(temperature):
    """Features are close to the centre of their label, but for 16 outliers, each of its own label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (256,), generator=generator)
    centres = torch.randn(10, 128, generator=generator)
    emb = centres[labels] + 0.2 * torch.randn(2, 256, 128, generator=generator)
    emb[:, :16] = torch.randn(2, 16, 128, generator=generator)
    labels[:16] = 10 + torch.arange(16)
    exact = emb.double().requires_grad_()
    expected = published_by_loops(*exact, labels, temperature)
    expected.backward()
    loss = BNSLoss(temperature)(*emb.requires_grad_(), labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-5)
    # Of every image, since outliers have smaller gradients, and theirs hold positives that are not saturated.
    error = (emb.grad - exact.grad).norm(dim=-1) / exact.grad.norm(dim=-1)
    assert error.max() < 1e-5


def run_one_of_two_processes(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    emb_i, emb_j, labels = batch(12, 3)
    for form in FORMS:
        loss = BNSLoss(form=form)(emb_i[rank::2], emb_j[rank::2], labels[rank::2])
        torch.save((loss.detach(), *torch.autograd.grad(loss, (emb_i, emb_j))), folder / f"{form}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    mp.spawn(run_one_of_two_processes, (tmp_path,), nprocs=2)
    emb_i, emb_j, labels = batch(12, 3)
    order = torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2)))  # as the processes hold them
    for form in FORMS:
        loss = BNSLoss(form=form)(emb_i[order], emb_j[order], labels[order])
        gradients = torch.autograd.grad(loss, (emb_i, emb_j))
        (loss_0, *gradients_0), (loss_1, *gradients_1) = (torch.load(tmp_path / f"{form}-{rank}") for rank in range(2))
        torch.testing.assert_close((loss_0, loss_1), (loss.detach(), loss.detach()))
        for expected, of_0, of_1 in zip(gradients, gradients_0, gradients_1, strict=True):
            torch.testing.assert_close((of_0 + of_1) / 2, expected)  # DDP averages over the two processes


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_gives_the_same_loss_without_synchronising(form):
    on_cpu = batch(64, 5, dtype=torch.float32)
    on_cuda = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in on_cpu]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = BNSLoss(form=form)(*on_cuda)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), BNSLoss(form=form)(*on_cpu), atol=1e-5, rtol=1e-5)
