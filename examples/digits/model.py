"""A small network for the digits of `make_data.py`: 64 pixels in, one number for each of the ten digits out."""

from torch import nn


def make_model() -> nn.Module:
    """4,810 parameters; pixels come in as numbers from -1 to 1, without an intercept."""
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
