"""low_rank: Eckart–Young against competitors and NumPy, energy in closed form, subspaces and their angles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.low_rank import (
    energy_profile,
    retained_energy,
    subspace_similarity,
    top_directions,
    truncated_svd,
)
from lora2qlora.memory import track_peak

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**16)


def random_matrix(rows, columns, seed, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_basis(d, columns, seed):
    return torch.linalg.qr(random_matrix(d, columns, seed)).Q


@st.composite
def matrix_and_rank(draw):
    rows, columns = draw(sizes), draw(sizes)
    return random_matrix(rows, columns, draw(seeds)), draw(st.integers(1, min(rows, columns)))


@settings(max_examples=60, deadline=None)
@given(matrix_and_rank())
def test_the_factors_multiply_to_numpys_truncation(case):
    matrix, rank = case
    B, A = truncated_svd(matrix, rank)
    assert (B.shape, A.shape) == ((matrix.shape[0], rank), (rank, matrix.shape[1]))
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose((B @ A).numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-12)
    # The error is what was cut off, and each factor carries the root of Σ.
    np.testing.assert_allclose(
        torch.linalg.matrix_norm(matrix - B @ A) ** 2, (s[rank:] ** 2).sum(), atol=1e-11
    )
    np.testing.assert_allclose((B.T @ B).numpy(), np.diag(s[:rank]), atol=1e-12)
    np.testing.assert_allclose((A @ A.T).numpy(), np.diag(s[:rank]), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(matrix_and_rank(), seeds)
def test_no_competitor_of_the_same_rank_comes_nearer(case, seed):
    matrix, rank = case
    B, A = truncated_svd(matrix, rank)
    random_B = random_matrix(matrix.shape[0], rank, seed)
    nudged_B = B + 0.01 * random_matrix(*B.shape, seed)
    for rival in (random_B, nudged_B):  # each with the A that suits it best, by least squares
        rival_error = matrix - rival @ torch.linalg.lstsq(rival, matrix).solution
        for norm in ("fro", 2):
            best = torch.linalg.matrix_norm(matrix - B @ A, norm)
            assert best <= torch.linalg.matrix_norm(rival_error, norm) + 1e-9


def test_a_matrix_of_rank_r_comes_back_whole():
    matrix = random_matrix(9, 3, 0) @ random_matrix(3, 7, 1)
    B, A = truncated_svd(matrix, 3)
    torch.testing.assert_close(B @ A, matrix)
    assert retained_energy(matrix, 3) == pytest.approx(1)
    assert retained_energy(matrix, 2) < 1 - 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_precision_is_computed_in_at_least_float32(dtype):
    matrix = random_matrix(8, 6, 0, dtype).requires_grad_()
    wide = matrix.detach().double()
    B, A = truncated_svd(matrix, 2)
    assert B.dtype == A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not any(result.requires_grad for result in (B, A, top_directions(matrix, 2)))
    expected_B, expected_A = truncated_svd(wide, 2)
    torch.testing.assert_close((B @ A).double(), expected_B @ expected_A, rtol=0, atol=1e-5)
    assert retained_energy(matrix, 2) == pytest.approx(retained_energy(wide, 2), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(matrix_and_rank())
def test_what_energy_leaves_is_the_squared_relative_error(case):
    matrix, rank = case
    B, A = truncated_svd(matrix, rank)
    error = torch.linalg.matrix_norm(matrix - B @ A) / torch.linalg.matrix_norm(matrix)
    assert 1 - retained_energy(matrix, rank) == pytest.approx(error.item() ** 2, abs=1e-12)
    profile = energy_profile(matrix)
    assert profile.shape == (min(matrix.shape),)
    assert profile[-1] == 1
    assert (profile.diff() >= 0).all()
    assert profile[rank - 1] == retained_energy(matrix, rank)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_energy_in_closed_form_at_any_scale(scale):
    for dtype in (torch.float32, torch.float64):
        matrix = torch.diag(torch.tensor([3.0, 4.0, 0.0], dtype=dtype)) * scale
        torch.testing.assert_close(energy_profile(matrix), torch.tensor([16 / 25, 1, 1]).double())
    assert retained_energy(torch.eye(5) * scale, 2) == pytest.approx(2 / 5)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_energy_where_squares_leave_float64(scale):
    matrix = torch.diag(torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)) * scale
    torch.testing.assert_close(energy_profile(matrix), torch.tensor([16 / 25, 1, 1]).double())


@pytest.mark.parametrize("function", [truncated_svd, top_directions])
@pytest.mark.parametrize("shape", [(2000, 2), (2, 2000)])
def test_a_long_matrix_takes_memory_by_its_length_and_not_by_its_square(function, shape):
    """All the singular vectors of the long side would be 16 MB beside the 16 kB of the matrix."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert track_peak(lambda: function(matrix, 1)).peak_bytes < 10 * matrix.nbytes


def test_a_zero_matrix_keeps_all_its_energy():
    zero = torch.zeros(3, 4)
    assert retained_energy(zero, 1) == 1.0
    assert energy_profile(zero).tolist() == [1.0, 1.0, 1.0]
    B, A = truncated_svd(zero, 2)
    assert (B.shape, A.shape) == ((3, 2), (2, 4))
    assert not (B @ A).any()


@settings(max_examples=40, deadline=None)
@given(matrix_and_rank())
def test_top_directions_are_the_ones_the_matrix_responds_to_most(case):
    matrix, rank = case
    V = top_directions(matrix, rank)
    torch.testing.assert_close(V.T @ V, torch.eye(rank, dtype=torch.float64))
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)[:rank]
    np.testing.assert_allclose(torch.linalg.vector_norm(matrix @ V, dim=0), sigma, atol=1e-12)


@pytest.mark.parametrize("degrees", [0, 17, 45, 90])
def test_the_similarity_of_two_lines_is_the_squared_cosine(degrees):
    angle = math.radians(degrees)
    U, V = torch.tensor([[1.0], [0.0]]), torch.tensor([[math.cos(angle)], [math.sin(angle)]])
    assert subspace_similarity(U, V) == pytest.approx(math.cos(angle) ** 2, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 12), seeds)
def test_similarity_is_symmetric_bounded_and_blind_to_the_choice_of_basis(data, d, seed):
    i, j = data.draw(st.integers(1, d)), data.draw(st.integers(1, d))
    U, V = random_basis(d, i, seed), random_basis(d, j, seed + 1)
    similarity = subspace_similarity(U, V)
    assert 0 <= similarity <= 1
    assert similarity == pytest.approx(subspace_similarity(V, U))
    assert similarity == pytest.approx(subspace_similarity(U @ random_basis(i, i, seed + 2), V))
    cosines = np.linalg.svd((U.T @ V).numpy(), compute_uv=False)  # of the principal angles
    assert similarity == pytest.approx((cosines**2).mean())


def test_one_space_inside_the_other_is_one_and_beside_it_zero():
    Q = random_basis(10, 10, 0)
    assert subspace_similarity(Q[:, :3], Q[:, :7]) == pytest.approx(1)
    assert subspace_similarity(Q[:, :3], Q[:, 3:]) == pytest.approx(0, abs=1e-12)
    assert subspace_similarity(Q[:, :4], Q[:, 2:6]) == pytest.approx(2 / 4)


def test_random_subspaces_overlap_by_the_larger_over_the_dimension():
    d, i, j = 40, 3, 8
    mean = np.mean(
        [subspace_similarity(random_basis(d, i, s), random_basis(d, j, s + 500)) for s in range(60)]
    )
    assert mean == pytest.approx(j / d, rel=0.1)


def test_the_papers_formula_on_two_adapters():
    A8, A64 = random_matrix(8, 50, 0, torch.float32), random_matrix(40, 50, 1, torch.float32)
    _, _, vt8 = np.linalg.svd(A8.numpy(), full_matrices=False)
    _, _, vt64 = np.linalg.svd(A64.numpy(), full_matrices=False)
    expected = np.linalg.norm(vt8[:4] @ vt64[:16].T, "fro") ** 2 / 4
    got = subspace_similarity(top_directions(A8, 4), top_directions(A64, 16))
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_basis_rounded_to_bfloat16_still_passes():
    Q = random_basis(64, 8, 0).bfloat16()
    assert subspace_similarity(Q, Q) == pytest.approx(1, abs=0.01)
    assert subspace_similarity(Q, Q) <= 1


def test_a_basis_may_be_off_by_a_hundredth_and_no_more():
    U, V = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    V[0, 1] = 0.01  # the product of its columns, exactly
    assert subspace_similarity(U, V) == pytest.approx(1, abs=0.01)
    V[0, 1] = math.nextafter(0.01, 1)
    with pytest.raises(ValueError, match="columns of V"):
        subspace_similarity(U, V)


def test_bases_are_compared_where_they_are():
    Q = random_basis(6, 4, 0)
    with torch.device("meta"):  # new tensors are made elsewhere
        assert subspace_similarity(Q[:, :2], Q) == pytest.approx(1)


FUNCTIONS = [truncated_svd, retained_energy, top_directions]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_outside_the_matrix(function, rank):
    with pytest.raises(ValueError, match=rf"1\.\.4 for a matrix \[4, 6\], got {rank}"):
        function(torch.ones(4, 6), rank)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rank", [2.0, True, "2", None])
def test_a_rank_that_is_no_int(function, rank):
    with pytest.raises(TypeError, match=f"rank must be an int, got {rank!r}"):
        function(torch.ones(4, 6), rank)


@pytest.mark.parametrize(
    "function", [*FUNCTIONS, lambda m, _: energy_profile(m), lambda m, _: subspace_similarity(m, m)]
)
def test_what_is_no_finite_float_matrix(function):
    for value in (math.nan, math.inf, -math.inf):
        matrix = torch.ones(4, 6)
        matrix[2, 5] = value
        with pytest.raises(ValueError, match=rf"entry \[2, 5\] is {value}"):
            function(matrix, 1)
    with pytest.raises(ValueError, match=r"rows and columns, got shape \(4,\)"):
        function(torch.ones(4), 1)
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        function(torch.ones(0, 3), 1)
    for wrong, name in ((torch.ones(2, 2, dtype=torch.int64), "int64"), (np.ones((2, 2)), "ndarray")):
        with pytest.raises(TypeError, match=rf"need a float tensor, got (torch\.)?{name}$"):
            function(wrong, 1)


def test_bases_that_are_none():
    Q = random_basis(6, 2, 0)
    with pytest.raises(ValueError, match=r"as many rows.* got 6 and 5"):
        subspace_similarity(Q, random_basis(5, 2, 0))
    with pytest.raises(ValueError, match=r"columns of V \(6, 2\) are not orthonormal.*0\.21 off"):
        subspace_similarity(Q, Q * 1.1)
    with pytest.raises(ValueError, match=r"columns of U \(2, 6\) are not orthonormal"):
        subspace_similarity(Q.T, Q.T)
