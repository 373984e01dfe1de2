"""The private gradient, and mutations of it: each way to break it must be seen by a test here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from silotune.client.training import dp_optimizer
from silotune.client.training.dp_optimizer import (
    ClippingOptimizer,
    DPOptimizer,
    private_gradient,
)
from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import PER_EXAMPLE, by_expanding
from silotune.client.training.privacy_units import Group, UnitBatch
from silotune.common.tasks.classification import per_example_loss

CLIP = 0.75  # not 1, which a factor too many or too few would leave as it is


class Silent(NoiseSource):
    """A source whose noise is zero, to see the clipped sum itself."""

    def normal(self, shape: tuple[int, ...]) -> Any:
        return np.zeros(shape)


class Toy:
    """A two-layer network on made-up rows: inputs [n, 5], three classes."""

    def __init__(self, n: int = 40, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        for p in [*self.first.parameters(), *self.second.parameters()]:
            p.data = torch.randn(p.shape, generator=g)
        self.x = 4 * torch.randn(n, 5, generator=g)
        self.y = torch.randint(3, (n,), generator=g)
        self.linears = [self.first, self.second]
        self.parameters = [p for linear in self.linears for p in linear.parameters()]

    def losses(self, index: Tensor) -> Tensor:
        return per_example_loss(self.second(torch.tanh(self.first(self.x[index]))), self.y[index])

    def gradient(
        self,
        batches: list[Tensor],
        source: NoiseSource | None = None,
        sigma: float = 1e-6,
        divisor: float = 1.0,
    ) -> Tensor:
        """The flat private gradient; its grain is 2^-10 sigma, so sigma is small by default."""
        optimizer = DPOptimizer(
            torch.optim.SGD(self.parameters, lr=1.0),
            source=source or Silent(site="a"),
            noise_multiplier=sigma,
            clip_norm=CLIP,
            divisor=divisor,
        )
        groups = [Group(len(b), [UnitBatch(b, len(b))]) for b in batches]
        private_gradient(self.linears, optimizer, groups, self.losses)
        return flat(p.grad for p in self.parameters)

    def by_hand(self, index: Tensor) -> Tensor:
        """The clipped sum, one record at a time."""
        total = torch.zeros(sum(p.numel() for p in self.parameters))
        for i in index:
            grads = torch.autograd.grad(self.losses(i[None]).sum(), self.parameters)
            g = flat(grads)
            total += g * min(1.0, CLIP / float(g.norm()))
        return total


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def test_per_example_gradients_equal_a_loop_and_opacus() -> None:
    toy = Toy()
    index = torch.arange(12)
    ours = by_expanding(toy.linears, index, toy.losses)
    for i in range(12):
        loop = torch.autograd.grad(toy.losses(index[i : i + 1]).sum(), toy.parameters)
        for p, g in zip(toy.parameters, loop, strict=True):
            torch.testing.assert_close(ours[p][i], g, rtol=1e-5, atol=1e-6)
    network = GradSampleModule(
        nn.Sequential(toy.first, nn.Tanh(), toy.second), loss_reduction="sum"
    )
    rows = toy.x[index].requires_grad_()  # or torch warns about Opacus' full backward hooks
    per_example_loss(network(rows), toy.y[index]).sum().backward()
    for p in toy.parameters:
        torch.testing.assert_close(ours[p], p.grad_sample, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_sequence_inputs_equal_a_loop() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 3, bias=False), torch.randn(6, 7, 4)

    def losses(index: Tensor) -> Tensor:
        return torch.tanh(linear(x[index])).square().sum((1, 2))

    ours = by_expanding([linear], torch.arange(6), losses)[linear.weight]
    for i in range(6):
        loop = torch.autograd.grad(losses(torch.tensor([i])).sum(), linear.weight)[0]
        torch.testing.assert_close(ours[i], loop, rtol=1e-5, atol=1e-6)


def test_the_modules_are_left_as_they_were() -> None:
    toy = Toy()
    before = toy.losses(torch.arange(5)).detach()
    toy.gradient([torch.arange(5)])
    assert "forward" not in toy.first.__dict__
    torch.testing.assert_close(toy.losses(torch.arange(5)).detach(), before)


# --- properties that a mutation below must break ---------------------------------------------


def clipped_sum_is_right() -> None:
    toy = Toy()
    index = torch.arange(len(toy.x))
    torch.testing.assert_close(
        toy.gradient(list(index.split(7))), toy.by_hand(index), rtol=1e-4, atol=1e-5
    )


def sensitivity_is_the_clip_norm() -> None:
    """Leaving out any one record moves the sum by at most CLIP (1 + 1e-5)."""
    for seed in range(10):
        toy = Toy(seed=seed)
        index = torch.arange(len(toy.x))
        whole = toy.gradient([index])
        for i in range(len(index)):
            without = toy.gradient([torch.cat([index[:i], index[i + 1 :]])])
            assert float((whole - without).norm()) <= CLIP * (1 + 1e-5)


def the_sum_is_exact() -> None:
    """No order and no split of the same records changes a bit of their sum."""
    toy = Toy(n=300)
    index = torch.arange(len(toy.x))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
    optimizer = DPOptimizer(
        torch.optim.SGD(toy.parameters, lr=1.0),
        source=Silent(site="a"),
        noise_multiplier=1e-6,
        clip_norm=CLIP,
        divisor=1.0,
    )
    sums = []
    gradients = by_expanding(toy.linears, index, toy.losses)
    for batches in ([index], [order], list(order.split(17))):
        optimizer.begin()
        for batch in batches:
            for p in toy.parameters:
                p.grad_sample = gradients[p][batch]  # type: ignore[attr-defined]
            optimizer.clip_and_accumulate()
        sums.append(flat(p.summed_grad for p in toy.parameters))  # type: ignore[attr-defined]
    assert all(bool((found == sums[0]).all()) for found in sums[1:])


def noise_has_the_right_scale() -> None:
    toy = Toy()
    source = NoiseSource(site="a", insecure_seed=5)
    index, sigma, divisor = torch.arange(10), 3.0, 20.0
    clean = toy.gradient([index], divisor=divisor)
    draws = torch.stack([toy.gradient([index], source, sigma, divisor) - clean for _ in range(400)])
    std, n = sigma * CLIP / divisor, draws.numel()
    assert abs(float(draws.std()) / std - 1) < 4 / np.sqrt(2 * n)
    assert abs(float(draws.mean())) < 4 * std / np.sqrt(n)


def an_empty_batch_is_only_noise() -> None:
    toy = Toy()
    assert float(toy.gradient([]).abs().max()) == 0.0
    noisy = toy.gradient([], NoiseSource(site="a"), sigma=2.0)
    # One coordinate in 2,600 is zero: the noise lies on a grid of 2^-10 sigma.
    assert int((noisy == 0).sum()) < 5


def a_record_that_overflows_cannot_spoil_the_sum() -> None:
    """A server's weights may make one record's loss NaN; that must not show without noise."""
    toy = Toy()
    index = torch.arange(len(toy.x))
    toy.x[7] = torch.tensor([3e38, -3e38, 3e38, -3e38, 3e38])
    toy.first.weight.data[0] = 3e38
    bad = next(iter(by_expanding([toy.second], index[7:8], toy.losses).values()))
    assert not bool(torch.isfinite(bad).all())
    whole = toy.gradient([index])
    without = toy.gradient([torch.cat([index[:7], index[8:]])])
    assert bool(torch.isfinite(whole).all())
    assert float((whole - without).norm()) <= CLIP * (1 + 1e-5)


def no_noise_repeats_between_steps() -> None:
    toy = Toy()
    source = NoiseSource(site="a", insecure_seed=6)
    a, b = (toy.gradient([], source) for _ in range(2))
    assert not bool((a == b).any())


PROPERTIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        clipped_sum_is_right,
        sensitivity_is_the_clip_norm,
        the_sum_is_exact,
        noise_has_the_right_scale,
        an_empty_batch_is_only_noise,
        a_record_that_overflows_cannot_spoil_the_sum,
        no_noise_repeats_between_steps,
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    PROPERTIES[name]()


# --- mutations: the mechanism broken on purpose ----------------------------------------------


@contextmanager
def no_clipping(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(self: DPOptimizer) -> None:
        for p in self.params:
            p.summed_grad += p.grad_sample.double().sum(dim=0) / self.unit

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)
    yield


@contextmanager
def clip_each_tensor_by_itself(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(self: DPOptimizer) -> None:
        for p in self.params:
            norms = p.grad_sample.flatten(1).norm(dim=1)
            factor = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            units = 1 / self.unit
            p.summed_grad += torch.einsum("i,i...", factor, p.grad_sample) * units

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)
    yield


@contextmanager
def a_sum_of_floats(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(self: DPOptimizer) -> None:
        flat_ = torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1)
        factor = (self.max_grad_norm / (flat_.norm(dim=1) + 1e-6)).clamp(max=1.0)
        for p in self.params:
            units = 1 / self.unit
            p.summed_grad += torch.einsum("i,i...", factor, p.grad_sample) * units

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)
    yield


@contextmanager
def half_the_noise(patch: pytest.MonkeyPatch) -> Iterator[None]:
    original = NoiseSource.normal
    patch.setattr(NoiseSource, "normal", lambda self, shape: 0.5 * original(self, shape))
    yield


@contextmanager
def noise_once_per_micro_batch_divisor(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The noise divided by the divisor twice: the mistake of scaling before adding."""
    original = DPOptimizer.add_noise

    def broken(self: DPOptimizer) -> None:
        self.noise_multiplier /= self.divisor
        original(self)

    patch.setattr(DPOptimizer, "add_noise", broken)
    yield


@contextmanager
def batch_mean_loss(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(linears: Any, index: Tensor, losses: Any) -> Any:
        return by_expanding(linears, index, lambda i: losses(i).mean().expand(len(i)) / len(i))

    patch.setitem(PER_EXAMPLE, "expanded", broken)
    yield


@contextmanager
def fake_record_on_an_empty_batch(patch: pytest.MonkeyPatch) -> Iterator[None]:
    original = dp_optimizer.private_gradient

    def broken(linears: Any, optimizer: Any, batches: Any, losses: Any) -> None:
        fake = [Group(1, [UnitBatch(torch.zeros(1, dtype=torch.long), 1)])]
        original(linears, optimizer, list(batches) or fake, losses)

    patch.setitem(globals(), "private_gradient", broken)
    yield


@contextmanager
def not_finite_gradients_kept(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(self: DPOptimizer) -> None:
        norms = torch.cat([p.grad_sample.flatten(1) for p in self.params], dim=1).norm(dim=1)
        factors = (self.effective_clip_norm / norms).clamp(max=1.0) / self.unit
        for p in self.params:
            p.summed_grad += torch.einsum("i,i...", factors, p.grad_sample).round()

    patch.setattr(DPOptimizer, "clip_and_accumulate", broken)
    yield


@contextmanager
def shared_seed(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setattr(
        NoiseSource, "normal", lambda self, shape: np.random.default_rng(0).normal(size=shape)
    )
    yield


MUTATIONS = {
    no_clipping: "sensitivity_is_the_clip_norm",
    clip_each_tensor_by_itself: "sensitivity_is_the_clip_norm",
    a_sum_of_floats: "the_sum_is_exact",
    half_the_noise: "noise_has_the_right_scale",
    noise_once_per_micro_batch_divisor: "noise_has_the_right_scale",
    batch_mean_loss: "clipped_sum_is_right",
    not_finite_gradients_kept: "a_record_that_overflows_cannot_spoil_the_sum",
    fake_record_on_an_empty_batch: "an_empty_batch_is_only_noise",
    shared_seed: "no_noise_repeats_between_steps",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_broken_mechanism_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with mutation(monkeypatch), pytest.raises(AssertionError):
        PROPERTIES[MUTATIONS[mutation]]()


# --- what one step tells about one record ----------------------------------------------------


def test_one_step_tells_neighbours_apart_no_better_than_the_gaussian_mechanism() -> None:
    """The empirical mu of D against D' along their difference lies in [0.8 / sigma, 1 / sigma]."""
    toy, sigma, trials = Toy(), 2.0, 600
    index = torch.arange(len(toy.x))
    gradients = by_expanding(toy.linears, index, toy.losses)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    worst = int(norms.argmax())
    rest = torch.cat([index[:worst], index[worst + 1 :]])
    direction = toy.gradient([index]) - toy.gradient([rest])
    norm = float(direction.norm())
    assert norm > 0.99 * CLIP  # the record that is left out is one whose gradient is clipped
    direction /= norm
    source = NoiseSource(site="a", insecure_seed=8)
    with_it = [float(toy.gradient([index], source, sigma) @ direction) for _ in range(trials)]
    without = [float(toy.gradient([rest], source, sigma) @ direction) for _ in range(trials)]
    spread = np.sqrt((np.var(with_it) + np.var(without)) / 2)
    mu = (np.mean(with_it) - np.mean(without)) / spread
    slack = 3 * np.sqrt(2 / trials)  # three standard errors of the difference of the means
    assert 0.8 / sigma - slack <= mu <= 1 / sigma + slack


def test_the_optimizer_refuses_to_run_without_noise() -> None:
    toy = Toy()
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive noise"):
            toy.gradient([], sigma=sigma)


def test_clipping_alone_gives_the_clipped_sum_and_no_noise() -> None:
    """For variants that show what the noise costs; records that are not clipped count whole."""
    toy = Toy()
    index = torch.arange(len(toy.x))
    optimizer = ClippingOptimizer(
        torch.optim.SGD(toy.parameters, lr=1.0), clip_norm=CLIP, divisor=8.0
    )
    groups = [Group(len(b), [UnitBatch(b, len(b))]) for b in index.split(7)]
    private_gradient(toy.linears, optimizer, groups, toy.losses)
    found = flat(p.grad for p in toy.parameters)
    torch.testing.assert_close(found, toy.by_hand(index) / 8.0, rtol=1e-4, atol=1e-5)
    assert 0 < optimizer.unclipped < optimizer.units == len(index)


def test_a_parameter_outside_the_clipped_set_is_refused() -> None:
    toy = Toy()
    toy.linears = [toy.second]
    with pytest.raises(ValueError, match="exactly the parameters"):
        toy.gradient([torch.arange(3)])
