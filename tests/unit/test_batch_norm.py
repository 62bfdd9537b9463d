"""BatchNorm statistics of pages: mixed by weight, layer after layer, and refused where they mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from doccls.data.dataset import Batch
from doccls.data.sampler import BatchPlace
from doccls.errors import UserError
from doccls.prediction.batch_norm import MAX_PAGES, adapt_batch_norm, choose_pages, has_batch_norm
from doccls.training.evaluate import Normalizer

COUNT, SIZE = 10, 6
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def draw_pages(seed: int = 0) -> torch.Tensor:
    """Return (n, size, size, 3) uint8."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8))


def make_batches(pages: torch.Tensor, sizes: tuple[int, ...] = (4, 4, 2)) -> list[Batch]:
    starts = np.cumsum([0, *sizes])
    return [
        Batch(pages[start : start + size], torch.full((size,), -1), torch.arange(start, start + size),
              BatchPlace("predict", 0, number=number))
        for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]  # fmt: skip


def adapt(model: nn.Module, pages: torch.Tensor, prior: int, sizes: tuple[int, ...] = (4, 4, 2)) -> None:
    accelerator = Accelerator(cpu=True)
    normalize = Normalizer(MEAN, STD, accelerator.device)
    adapt_batch_norm(model, make_batches(pages, sizes), normalize, accelerator, len(pages), prior)


def make_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.tensor([1.0, -1.0, 0.5])
    norm.running_var = torch.tensor([2.0, 0.5, 1.0])
    return norm.eval()


def normalize_pages(pages: torch.Tensor) -> torch.Tensor:
    return ((pages.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prior", [0, 5, 10**9])
def test_statistics_are_mixed_as_if_the_training_had_seen_prior_pages(prior: int) -> None:
    pages, model = draw_pages(), nn.Sequential(make_norm())
    source = make_norm()
    adapt(model, pages, prior)
    inputs, weight = normalize_pages(pages), COUNT / (prior + COUNT)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d) and not norm.training
    for found, own, expected in (
        (norm.running_mean, source.running_mean, inputs.mean((0, 2, 3))),
        (norm.running_var, source.running_var, inputs.var((0, 2, 3), correction=0)),
    ):
        assert found is not None and own is not None
        np.testing.assert_allclose(found, (1 - weight) * own + weight * expected, rtol=1e-5)


def test_inputs_of_a_layer_come_from_adapted_layers_before_it() -> None:
    """Each batch passes the first layer by its own mixture; the second layer's moments are of those inputs."""
    torch.manual_seed(0)
    first, second, conv = make_norm(), make_norm(), nn.Conv2d(3, 3, 3)
    first.weight.data, first.bias.data = torch.rand(3), torch.rand(3)
    pages, prior, weight = draw_pages(), 5, COUNT / (5 + COUNT)
    adapt(nn.Sequential(first, conv, nn.ReLU(), second), pages, prior)
    source, inputs, outputs = make_norm(), normalize_pages(pages).float(), []
    assert source.running_mean is not None and source.running_var is not None
    for batch in inputs.split([4, 4, 2]):
        mean = torch.lerp(source.running_mean, batch.mean((0, 2, 3)), weight)
        var = torch.lerp(source.running_var, batch.var((0, 2, 3), correction=0), weight)
        with torch.no_grad():
            hidden = nn.functional.batch_norm(batch, mean, var, first.weight, first.bias)
            outputs.append(nn.functional.relu(conv(hidden)))
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs])
    squares = torch.stack([(output**2).mean((0, 2, 3)) for output in outputs])
    sizes = torch.tensor([4.0, 4.0, 2.0])[:, None] / COUNT
    mean, square = (sizes * means).sum(0), (sizes * squares).sum(0)
    np.testing.assert_allclose(second.running_mean, torch.lerp(source.running_mean, mean, weight), rtol=1e-4)
    np.testing.assert_allclose(second.running_var, torch.lerp(source.running_var, square - mean**2, weight), rtol=1e-4)


def test_statistics_of_layers_without_pictures_are_adapted_too() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    pages = draw_pages()
    adapt(model, pages, 0)
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None
    np.testing.assert_allclose(norm.running_var, normalize_pages(pages).mean((2, 3)).var(0, correction=0), rtol=1e-4)


def test_repeated_adaptation_gives_the_same_bytes_and_leaves_no_hooks() -> None:
    states = []
    for _ in range(2):
        model = nn.Sequential(make_norm(), nn.Conv2d(3, 3, 3, bias=False), make_norm())
        torch.manual_seed(1)
        nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
        adapt(model, draw_pages(), 7)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            model(torch.zeros(1, 3, SIZE, SIZE))
        assert all(torch.equal(value, states[-1][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_model_without_statistics_is_refused() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))):
        assert not has_batch_norm(model.state_dict())
        with pytest.raises(UserError, match="no BatchNorm layer with running statistics"):
            adapt(model, draw_pages(), 0)
    assert has_batch_norm(nn.Sequential(make_norm()).state_dict())


def test_layers_that_count_no_batches_are_not_taken_for_batch_norm() -> None:
    assert not has_batch_norm({"norm.running_var": torch.ones(3)})


def test_pages_for_the_statistics_are_spread_evenly() -> None:
    rows = np.arange(3, 40)
    assert choose_pages(rows) is rows
    many = np.arange(7, 7 + 5 * MAX_PAGES)
    chosen = choose_pages(many)
    assert len(chosen) == len(set(chosen.tolist())) == MAX_PAGES and chosen[0] == 7 and chosen[-1] == many[-1]
    assert set(np.diff(chosen).tolist()) <= {4, 5, 6}
