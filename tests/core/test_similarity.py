# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import similarity
from kdlvfm.core.similarity import cka, tap_cka


def reference(x, y):
    """CKA from its definition: centred Gram matrices of samples."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    first, second = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    return ((first * second).sum() / (first.norm() * second.norm())).item()


def rows(x):
    return x.movedim(1, -1).flatten(0, 2)


def test_maps_are_compared_position_by_position_on_the_smaller_grid():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 12, 4)
    small = [
        F.interpolate(x, (6, 4), mode="bilinear", align_corners=False, antialias=x is teacher or x is student)
        for x in (student, teacher)
    ]
    assert tap_cka(student, teacher).item() == pytest.approx(reference(*map(rows, small)), rel=1e-5)
    assert tap_cka(student, 3 * student).item() == pytest.approx(1)


def test_tokens_of_one_number_are_positions_and_everything_else_is_a_vector_for_each_image():
    torch.manual_seed(0)
    student, teacher, pooled = torch.randn(4, 6, 5), torch.randn(4, 6, 7), torch.randn(4, 9)
    expected = reference(student.flatten(0, 1), teacher.flatten(0, 1))
    assert tap_cka(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert tap_cka(student, pooled).item() == pytest.approx(reference(student.mean(1), pooled), rel=1e-5)
    image = torch.randn(4, 3, 5, 2)
    assert tap_cka(image, pooled).item() == pytest.approx(reference(image.mean((2, 3)), pooled), rel=1e-5)
    more = torch.randn(4, 11, 7)
    assert tap_cka(student, more).item() == pytest.approx(reference(student.mean(1), more.mean(1)), rel=1e-5)


def test_few_samples_say_nothing():
    assert tap_cka(torch.randn(2, 5), torch.randn(2, 7)) is None
    assert tap_cka(torch.randn(4, 5), torch.randn(3, 7)) is None
    assert tap_cka(torch.randn(2, 5, 1, 1), torch.randn(2, 7, 4, 4)) is None


def test_of_many_positions_some_stand_for_all_and_nothing_random_depends_on_it():
    torch.manual_seed(0)
    student, other = torch.randn(2, 4, 24, 24), torch.randn(2, 4, 24, 24)
    teacher = torch.cat([student[:, :3], other], 1)
    state = torch.get_rng_state()
    some = tap_cka(student, teacher, samples=600)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tap_cka(student, teacher, samples=600), some)
    expected = reference(rows(student), rows(teacher))
    assert some.item() != pytest.approx(expected, rel=1e-6)
    assert some.item() == pytest.approx(expected, rel=0.1)


def test_the_places_compared_are_spread_over_all_images_rows_and_columns():
    # Where only column c of image b differs from the rest, that column is seen.
    for image in range(2):
        for column in (0, 31, 63):
            x = torch.zeros(2, 1, 64, 64)
            x[image, 0, :, column] = 1
            assert tap_cka(x, x).item() == pytest.approx(1)


def test_no_gradient_and_half_precision():
    student = torch.randn(3, 5, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = tap_cka(student.bfloat16(), torch.randn(3, 7, 4, 4).bfloat16())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not tap_cka(student, student).requires_grad
    assert cka(student, student.detach()).requires_grad


def test_products_of_scaled_rows_in_pieces(monkeypatch):
    """Seven columns in pieces of three; the scale is taken in before the squares leave the range of floats."""
    monkeypatch.setattr(similarity, "block_length", lambda x, entries: 3)
    torch.manual_seed(0)
    rows, scale = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(similarity.scaled_product(rows, scale), rows @ rows.T / 4)
    assert torch.autograd.gradcheck(lambda x: similarity.scaled_product(x, scale), (rows,))
    tiny = (rows.detach() * 1e-30).float()
    torch.testing.assert_close(similarity.scaled_product(tiny, torch.tensor(1e30)), (rows @ rows.T).float().detach())
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(similarity.scaled_product(rows, scale).sum(), rows, create_graph=True)
