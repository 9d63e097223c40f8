"""The networks: stem, initialisation, what trains, and the CIFAR ResNets against one written with functions."""
import pytest
import torch
import torch.nn.functional as F

from models import BNSNetwork, Classifier, create_encoder


def random_images(count, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, channels", [("resnet18", 512), ("resnet50", 2048), ("resnet50_gn", 2048)])
def test_cifar_stem_keeps_the_resolution(name, channels):
    encoder = create_encoder(name)
    assert encoder.conv1.weight.shape == (64, 3, 3, 3) and encoder.conv1.stride == (1, 1) and encoder.conv1.bias is None
    assert encoder.forward_features(random_images(2)).shape == (2, channels, 4, 4)
    assert encoder(random_images(2)).shape == (2, channels) and encoder.num_features == channels


@pytest.mark.parametrize("name, number", [("resnet18", 20), ("cifar_resnet32", 31)])
def test_initialisation_is_he_normal_with_fan_out(name, number):
    encoder = create_encoder(name)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    convolutions = [module.weight for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(norms) == len(convolutions) == number and all((norm.weight == 1).all() for norm in norms)
    for weight in convolutions:
        assert weight.std().item() == pytest.approx((2 / weight[:, 0].numel()) ** 0.5, rel=0.15)
    assert encoder.training


def test_each_view_has_its_own_batch_statistics():
    network = BNSNetwork(create_encoder("test_resnet"), 16)
    bright, dark = random_images(8, seed=1), 0.2 * random_images(8, seed=2)
    projections = network(bright, dark)
    for view, projection in zip((bright, dark), projections, strict=True):
        torch.testing.assert_close(projection, network(view)[0])
    together = torch.cat(projections) - network(torch.cat((bright, dark)))[0]
    assert together.abs().max() > 0.1


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_step_changes_only_what_is_trained(frozen):
    model = Classifier(create_encoder("test_resnet"), 10, frozen=frozen).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(random_images(8)), torch.arange(8)).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"lin.weight", "lin.bias"} <= changed
    assert changed == ({"lin.weight", "lin.bias"} if frozen else set(before))


def test_logits_are_float32_under_autocast():
    linear = Classifier(create_encoder("test_resnet"), 10).lin
    features = 100 * torch.rand(64, linear.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(features.bfloat16())
    expected = F.linear(features.bfloat16().double(), linear.weight.double(), linear.bias.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-6)


def cifar_resnet_by_functions(weights, x, blocks):
    def norm(x, name):
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.relu(norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for group in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{group}.{block}", 2 if group > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
                x = torch.cat((zeros, F.avg_pool2d(x, 1, stride=2), zeros), dim=1)
            x = F.relu(x + y)
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_cifar_resnet_equals_one_written_with_functions(depth):
    encoder, images = create_encoder(f"cifar_resnet{depth}"), random_images(4)
    for _ in range(3):  # batch statistics other than those of a new model
        encoder(random_images(16, seed=1))
    with torch.no_grad():
        features = encoder.eval()(images)
    assert features.shape == (4, 64) and encoder.num_features == 64
    expected = cifar_resnet_by_functions(encoder.state_dict(), images, (depth - 2) // 6)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.std(0).min() > 1e-3, "the features must depend on the images"
