"""Small networks that the tests of neural layers share, one of every kind of layer, and users' examples for them."""

import torch
from torch import nn

from client.network_fit import Examples
from common.networks import AdaptedNetwork, adapt


class ConvNet(nn.Module):
    """A stride, a padding and a dilation; 7 x 7 pixels, three classes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias)
        self.second = nn.Conv2d(3, 4, (2, 1), dilation=(2, 1), bias=bias)
        self.head = nn.Linear(32, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 2, 7, 7)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


class Words(nn.Module):
    """Two words of five, whose numbers come as floats; words that are none become some."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(6, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(x.long().clamp(0, 4))).flatten(1))


class Sequence(nn.Module):
    """A linear layer applied to each of four places, then their mean."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.each = nn.Linear(3, 5, bias=bias)
        self.head = nn.Linear(5, 2, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.each(x.reshape(-1, 4, 3))).mean(1))


def mlp(inputs: int = 4, outputs: int = 1, bias: bool = True) -> nn.Module:
    """Two linear layers with another in between that has no adapter's kind."""
    return nn.Sequential(nn.Linear(inputs, 6, bias=bias), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, outputs, bias=bias))


MODULES = {
    "mlp": (mlp, 4, 1),
    "classes": (lambda bias: mlp(4, 3, bias), 4, 3),
    "convolutions": (ConvNet, 98, 3),
    "words": (Words, 2, 1),
    "sequence": (Sequence, 12, 2),
}
"""By name: what makes the module, its inputs and its outputs."""


def network(name: str, *, form: str = "vector", bias: bool = True, rank: int = 2, sparsity: int = 2, **more: object):
    """An adapted network with the same weights in every process."""
    make, inputs, outputs = MODULES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = make(bias=bias)
    return adapt(module, inputs=inputs, outputs=outputs, rank=rank, sparsity=sparsity, form=form, **more)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Standard normal numbers times `scale`."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared_of(adapted: AdaptedNetwork, scale: float = 0.3) -> torch.Tensor:
    """The base with some U."""
    architecture = adapted.architecture
    return torch.cat([adapted.base, random(architecture.shared_size - architecture.num_parameters, scale=scale)])


def examples(name: str, family: str, n: int, m: int, seed: int = 0) -> Examples:
    """Of n users with m examples each."""
    _, inputs, outputs = MODULES[name]
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, m, inputs, generator=generator)
    if name == "words":
        X = torch.randint(0, 5, (n, m, inputs), generator=generator).to(torch.float32)
    y = torch.randn(n, m, generator=generator)
    if family == "logistic":
        y = (y > 0).to(torch.float32)
    if family == "softmax":
        y = torch.randint(0, outputs, (n, m), generator=generator).to(torch.float32)
    return Examples(X=X, y=y, weight=torch.ones(n, m))


def users(of: Examples, index: list[int]) -> Examples:
    """Some of them, in another order perhaps."""
    return Examples(X=of.X[index], y=of.y[index], weight=of.weight[index])
