"""Low rank: the singular value decomposition, cut to r terms, and what a cut keeps. Chapters 01 and 02.

Every function takes a float matrix of any precision, computes in float32 (float64 where the matrix is),
and returns results detached from autograd.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def truncated_svd(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """The best rank-r approximation, as LoRA's two factors: B = U √Σ and A = √Σ Vᵀ.

    Of all matrices of rank r, `B @ A` is nearest to W in the Frobenius norm (Eckart and
    Young, 1936) and in the spectral norm (Mirsky, 1960). Each singular value is shared
    equally, so that `B.T @ B` and `A @ A.T` are both Σ.

    Returns `B` [out, r] and `A` [r, in]: float64 for a float64 matrix, else float32.
    Raises ValueError: rank outside 1..min(out, in), not a matrix, empty, or not
    finite; TypeError: not a float tensor. Chapter 01.
    """
    check_rank(rank, *_shape(matrix))
    U, sigma, Vh = torch.linalg.svd(_finite(matrix), full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def energy_profile(matrix: Float[Tensor, "out in"]) -> Float64[Tensor, " min(out,in)"]:
    """Energy kept by every rank: entry r - 1 is (σ₁² + … + σᵣ²) / (σ₁² + σ₂² + …).

    [1, a share of ‖W‖²] rising from at least 1 / min(out, in) to exactly 1. A zero
    matrix has no energy to lose: all its entries are 1. One decomposition serves all
    ranks; `retained_energy` reads one entry.

    Raises ValueError: not a matrix, empty, or not finite; TypeError: not a float
    tensor. Chapters 01 and 02.
    """
    _shape(matrix)
    sigma = torch.linalg.svdvals(_finite(matrix)).double()
    if sigma[0] == 0:
        return torch.ones_like(sigma)
    energy = (sigma / sigma[0]).square().cumsum(0)  # divided: no overflow
    return energy / energy[-1]


def retained_energy(matrix: Float[Tensor, "out in"], rank: int) -> float:
    """The energy that the best rank-r approximation keeps: (σ₁² + … + σᵣ²) / (σ₁² + σ₂² + …).

    [1, a share of ‖W‖²] between 0 and 1; 1 − this is the squared relative error of the approximation.
    A zero matrix keeps 1.0 at any rank: nothing is lost.

    Raises as `truncated_svd` does. Chapters 01 and 02.
    """
    check_rank(rank, *_shape(matrix))
    return energy_profile(matrix)[rank - 1].item()


def top_directions(matrix: Float[Tensor, "out in"], rank: int) -> Float[Tensor, "in r"]:
    """The first r right singular vectors of a matrix as orthonormal columns, strongest first.

    They are the directions of the input that the matrix responds to most; for the output's, pass
    `matrix.T`. `subspace_similarity` compares two such bases, as section 7.2 of LoRA does with those of A.

    Raises as `truncated_svd` does. Chapter 02.
    """
    check_rank(rank, *_shape(matrix))
    return torch.linalg.svd(_finite(matrix), full_matrices=False).Vh[:rank].T.contiguous()


def subspace_similarity(U: Float[Tensor, "d i"], V: Float[Tensor, "d j"]) -> float:
    """How far the smaller of two subspaces lies inside the larger: φ = ‖Uᵀ V‖² / min(i, j).

    The columns of `U` and of `V` are orthonormal bases of subspaces of the same d-dimensional space, as
    `top_directions` gives them. φ [1] is 1 where one space contains the other, 0 where they are
    orthogonal, and max(i, j) / d on average for random ones. It is the mean squared cosine of the angles
    between them, and does not depend on the choice of bases. LoRA, section 7.2, equation 4.

    Raises ValueError: not two matrices of as many rows, empty or not finite, or columns that are not
    orthonormal to 0.01; TypeError: not float tensors. Chapter 02.
    """
    if _shape(U)[0] != _shape(V)[0]:
        raise ValueError(f"U and V need as many rows, the space's dimension; got {len(U)} and {len(V)}")
    U, V = _finite(U).double(), _finite(V).double()
    for name, basis in (("U", U), ("V", V)):
        off = (
            (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)).abs().max()
        )
        if off > 0.01:
            raise ValueError(
                f"the columns of {name} {tuple(basis.shape)} are not orthonormal: {name}ᵀ {name} is "
                f"{off.item():.2g} off the identity; top_directions and torch.linalg.qr give such columns"
            )
    similarity = (U.T @ V).square().sum() / min(U.shape[1], V.shape[1])
    return min(similarity.item(), 1.0)


def check_rank(rank: int, out_features: int, in_features: int) -> None:
    """Raise unless `rank` is an int (TypeError) in 1..min(out, in) (ValueError)."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank <= min(out_features, in_features):
        most = min(out_features, in_features)
        raise ValueError(
            f"rank must be in 1..{most} for a matrix [{out_features}, {in_features}], got {rank}"
        )


def _shape(matrix: Tensor) -> tuple[int, int]:
    """The shape of a matrix; TypeError unless it is a float tensor, ValueError unless 2-D and not empty."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"need a float tensor, got {got}")
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"need a matrix with rows and columns, got shape {tuple(matrix.shape)}")
    return tuple(matrix.shape)


def _finite(matrix: Tensor) -> Tensor:
    """The matrix in float32 or float64, detached; ValueError naming the first entry that is not finite."""
    wrong = (~torch.isfinite(matrix)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(f"entry [{row}, {column}] is {matrix[row, column].item()}; need finite numbers")
    return matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
