"""The sixteen values of NF4, derived, and values fitted to normal weights. Chapter 07."""

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

OFFSET = 0.9677083  # the largest quantile taken: 1 - (1/32 + 1/30) / 2, to seven digits
ZERO = 7  # the code of 0


def _nf4_values() -> tuple[float, ...]:
    """The sixteen values: quantiles of N(0, 1) at 8 points for the positive half and 7 for the negative."""

    def quantiles(count):
        # float32 points, as in bitsandbytes: the last bits of the table hang on it
        points = torch.linspace(OFFSET, 0.5, count + 1, dtype=torch.float32, device="cpu")[:-1]
        return torch.special.ndtri(points.double())

    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    values = torch.cat([-quantiles(7), zero, quantiles(8).flip(0)]).float()
    return tuple((values / values.max()).tolist())


NF4_VALUES = _nf4_values()  # now, whatever modes are on when they are needed


def nf4_codebook() -> Float32[Tensor, "16"]:
    """The sixteen values of NF4, ascending from -1 to 1: 7 negative, zero, 8 positive.

    Each half is made of quantiles of N(0, 1), Φ⁻¹ at evenly spaced points between ½ and the offset
    0.9677083, divided by the largest. Equal bit for bit to bitsandbytes'. The paper's equation 4 gives
    −∞ when taken literally. QLoRA, section 3 and appendix E. Chapter 07.
    """
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device="cpu")


def absmax_scaled_density(points: Float64[Tensor, " n"], block_size: int) -> Float64[Tensor, " n"]:
    """Density of w / s inside (-1, 1), for a block of `block_size` [elements] normal weights w, s = max |w|.

    The one element that is the absmax sits at -1 or 1 and is left out: what is left has the mass
    1 - 1 / block_size. Given s the others are normal, cut at ±s; s itself has the density of the largest
    of `block_size` absolute values, and the two are integrated over s. Yoshida (2023), section 3. Chapter 07.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    s = torch.linspace(0, 8, 801, dtype=torch.float64)[1:]
    inside = torch.special.erf(s / 2**0.5)  # P(|w| < s)
    density = block_size * inside ** (block_size - 1) * 2 * normal.log_prob(s).exp()  # of s
    cut = s * normal.log_prob(points[:, None] * s).exp() / inside  # of w / s, given s
    return (1 - 1 / block_size) * torch.trapezoid(density * cut, s, dim=1)


def fitted_codebook(block_size: int, power: int = 1) -> Float32[Tensor, "16"]:
    """Sixteen values that minimize the mean |error|^power of w / s, for normal weights in blocks of one size.

    -1, 0 and 1 stay among them, as in NF4. power=1 is the aim of AF4 (Yoshida 2023, arXiv 2306.06965),
    power=2 the least squares of Lloyd and Max. Found by Lloyd's iteration on `absmax_scaled_density`:
    each free value moves to the median (or mean) of its cell, and cells end halfway between values.

    Raises ValueError: another power, or a block size below 2. Chapter 07.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (absolute error) or 2 (squared error), got {power!r}")
    if block_size < 2:
        raise ValueError(f"a block needs elements beside its absmax: block_size >= 2, got {block_size!r}")
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    density = absmax_scaled_density(x, block_size)
    mass_below = torch.cat([x[:1] * 0, torch.cumulative_trapezoid(density, x)])
    moment_below = torch.cat([x[:1] * 0, torch.cumulative_trapezoid(density * x, x)])
    values = nf4_codebook().double()
    free = torch.tensor([i for i in range(1, 15) if i != ZERO])
    for _ in range(2000):
        edges = (values[:-1] + values[1:]) / 2
        mass = _interpolate(edges, x, mass_below)
        if power == 1:
            inner = _interpolate((mass[:-1] + mass[1:]) / 2, mass_below, x)
        else:
            inner = _interpolate(edges, x, moment_below).diff() / mass.diff()
        new = values.clone()
        new[free] = inner[free - 1]  # the cell of value i is the inner cell i - 1
        moved, values = (new - values).abs().max(), new
        if moved < 1e-9:
            break
    return values.float()


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y where x is `at`, on straight lines between the points of an ascending x."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    return torch.lerp(y[left], y[right], (at - x[left]) / (x[right] - x[left]))
