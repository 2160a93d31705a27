# SPDX-License-Identifier: Apache-2.0
"""Shape, size and scale, against loops and numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import align


def test_promote_lifts_half_precision_only():
    for dtype in (torch.float16, torch.bfloat16):
        assert align.promote(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert align.promote(x) is x


def test_tokens_fill_the_map_row_by_row():
    tokens = torch.rand(2, 6, 5)
    x = align.tokens_to_map(tokens, (2, 3))
    assert x.shape == (2, 5, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(x[:, :, row, column], tokens[:, row * 3 + column])


def test_a_prefix_token_left_in_is_an_error():
    with pytest.raises(ValueError, match="7 tokens do not fill a grid of 2x3 = 6"):
        align.tokens_to_map(torch.rand(1, 7, 4), (2, 3))


def test_resize_of_equal_size_copies_nothing():
    x = torch.rand(1, 2, 4, 5)
    assert align.resize_map(x, (4, 5)) is x


def test_enlarging_interpolates_between_pixel_centres():
    ramp = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert align.resize_map(ramp, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_shrinking_averages_instead_of_skipping():
    stripes = torch.tensor([0.0, 1.0]).repeat(32).view(1, 1, 1, 64).expand(1, 1, 64, 64).contiguous()
    small = align.resize_map(stripes, (8, 8))
    assert (small - 0.5).abs().max() < 0.05
    torch.testing.assert_close(small, F.interpolate(stripes, size=(8, 8), mode="bilinear", antialias=True))


@pytest.mark.parametrize(
    ("resize", "size"), [("larger", (8, 9)), ("student", (4, 9)), ("teacher", (8, 6))], ids=lambda value: str(value)
)
def test_match_size_says_who_is_resized(resize, size):
    student, teacher = torch.rand(2, 3, 8, 6), torch.rand(2, 5, 4, 9)
    first, second = align.match_size(student, teacher, resize)
    assert first.shape == (2, 3, *size)
    assert second.shape == (2, 5, *size)
    if resize == "student":
        assert second is teacher
    if resize == "teacher":
        assert first is student


def test_larger_leaves_the_larger_map_alone():
    student, teacher = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 8, 8)
    assert align.match_size(student, teacher)[1] is teacher
    assert align.match_size(teacher, student)[0] is teacher


def test_a_grid_of_ones_own_takes_both():
    student, teacher = torch.rand(1, 2, 4, 4), torch.rand(1, 3, 8, 6)
    first, second = align.match_size(student, teacher, [5, 7])
    assert first.shape == (1, 2, 5, 7)
    assert second.shape == (1, 3, 5, 7)
    torch.testing.assert_close(second, align.resize_map(teacher, (5, 7)))


@pytest.mark.parametrize("resize", ["smaller", [3], [3, 0], [3, 4.5], [3, 4, 5]])
def test_match_size_refuses_anything_else(resize):
    with pytest.raises(ValueError, match="'larger', 'student', 'teacher' or a grid"):
        align.match_size(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), resize)


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (12, 16), (5, 7)])
def test_labels_are_resized_to_the_nearest_centre(size):
    labels = torch.randint(-1, 256, (2, 6, 8))
    resized = align.resize_labels(labels, size)
    assert resized.dtype == labels.dtype
    for row in range(size[0]):
        for column in range(size[1]):
            source = labels[:, int((row + 0.5) * 6 / size[0]), int((column + 0.5) * 8 / size[1])]
            assert torch.equal(resized[:, row, column], source)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 7), (2, 3, 4, 5)])
def test_standardise_against_numpy(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    axes = (0, *range(2, len(shape)))
    values = x.numpy()
    expected = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
    np.testing.assert_allclose(align.standardise(x).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_standardise_forgets_a_positive_affine_change_of_each_channel():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    scale, shift = torch.tensor([0.1, 2.0, 30.0]).view(3, 1, 1), torch.tensor([-5.0, 0.0, 9.0]).view(3, 1, 1)
    torch.testing.assert_close(align.standardise(x * scale + shift), align.standardise(x), rtol=1e-9, atol=1e-9)


def test_standardise_amplifies_noise_and_gradients_no_more_than_stated():
    x = (1e-6 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
    torch.testing.assert_close(align.standardise(x), (x - x.mean((0, 2, 3), keepdim=True)) * 1e3)
    align.standardise(x, min_std=0.1)[0, 0, 0, 0].backward()
    assert x.grad.abs().max() <= 10


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_standardise_of_a_constant_is_finite_in_value_and_gradient(value):
    x = torch.full((1, 2, 3, 3), value, requires_grad=True)
    result = align.standardise(x)
    result.square().sum().backward()
    assert result.isfinite().all()
    assert x.grad.isfinite().all()


def test_raw_target_is_the_tensor_itself():
    x = torch.randn(2, 3, 4, 5)
    assert align.normalise_target(x, "raw") is x
    assert align.normalise_target(x) is x


def test_standardize_target():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(align.normalise_target(x, "standardize"), align.standardise(x))


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 4, 5)])
def test_layernorm_target_against_numpy(shape):
    x = torch.randn(shape, dtype=torch.float64) * 5 + 1
    values = x.numpy()
    expected = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(align.normalise_target(x, "layernorm").numpy(), expected, rtol=1e-9, atol=1e-12)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be 'raw', 'standardize' or 'layernorm', not 'phi-s'"):
        align.normalise_target(torch.zeros(1, 1, 1, 1), "phi-s")


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    x = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]], dtype=torch.float64)
    assert align.unit_vectors(x).tolist() == [[[0.6, 0.0], [0.8, 0.0]]]
    assert align.unit_vectors(x, dim=2).tolist() == [[[1.0, 0.0], [1.0, 0.0]]]
    torch.testing.assert_close(align.unit_vectors(1e4 * x), align.unit_vectors(x))


def test_unit_vectors_amplify_gradients_no_more_than_stated():
    x = torch.zeros(1, 3, requires_grad=True)
    align.unit_vectors(x, min_norm=1e-2).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() <= 100.001


def test_class_masks_against_loops():
    target = torch.tensor([[[0, 2, 255], [-1, 1, 2]], [[255, 255, 255], [1, 1, 1]]])
    masks = align.class_masks(target, 3, (2, 3))
    assert masks.shape == (2, 3, 2, 3)
    assert masks.dtype == torch.bool
    for b in range(2):
        for row in range(2):
            for column in range(3):
                found = [k for k in range(3) if masks[b, k, row, column]]
                label = target[b, row, column].item()
                assert found == ([label] if 0 <= label < 3 else [])


def test_class_masks_of_another_size_follow_the_nearest_label():
    target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    assert torch.equal(align.class_masks(target, 2, (1, 2)), torch.tensor([[[[True, False]], [[False, True]]]]))
    assert torch.equal(align.class_masks(target, 2, (4, 8)).sum((2, 3)), torch.tensor([[16, 16]]))


def test_class_masks_leave_out_the_label_that_is_ignored_and_refuse_unknown_ones():
    target = torch.tensor([[[0, 1, 2]]])
    assert align.class_masks(target, 3, (1, 3), ignore_index=1).sum((0, 2, 3)).tolist() == [1, 0, 1]
    assert align.class_masks(target, 3, (1, 3), ignore_index=None).sum((0, 2, 3)).tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="num_classes"):
        align.class_masks(target, 2, (1, 3))


@pytest.mark.parametrize("rows", [3, 40])
def test_gram_distance_against_the_matrices(rows):
    """Fewer rows than channels, and more: two ways to one value and one gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, rows, 7, generator=generator, dtype=torch.float64)
    expected = np.mean([(a @ a.T - b @ b.T) ** 2 for a, b in zip(x.detach().numpy(), y.numpy(), strict=True)])
    loss = align.gram_distance(x, y)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, x)
    naive = (x @ x.mT - y @ y.mT).square().mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(naive, x)[0])


@pytest.mark.parametrize("rows", [3, 400])
def test_gram_distance_of_a_thing_to_itself_is_zero_and_autocast_changes_nothing(rows):
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(2, rows, 8, generator=generator), dim=2)
    y = F.normalize(x + 0.1 * torch.randn(2, rows, 8, generator=generator), dim=2)
    assert align.gram_distance(x, x).item() == pytest.approx(0, abs=1e-7)
    expected = align.gram_distance(x.double(), y.double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert align.gram_distance(x, y).item() == pytest.approx(expected, rel=1e-3)


def test_levels_must_be_equally_many_and_not_none_at_all():
    align.check_levels(dims=[3, 4], taps=("map.0", "map.1"))
    for dims, taps, found in (([3], ["map.0", "map.1"], "1 dims, 2 taps"), ([], [], "0 dims, 0 taps")):
        with pytest.raises(ValueError, match=f"each level needs one of these, .*: {found}"):
            align.check_levels(dims=dims, taps=taps)


def test_align_scale_against_numpy():
    student, teacher = (
        3 * torch.randn(2, 3, 4, 5, dtype=torch.float64) + 7,
        torch.randn(1, 3, 2, 2, dtype=torch.float64),
    )
    got = align.align_scale(student, teacher).numpy()
    for c in range(3):
        own, goal = student[:, c].numpy(), teacher[:, c].numpy()
        np.testing.assert_allclose(got[:, c], (own - own.mean()) / own.std() * goal.std() + goal.mean(), rtol=1e-9)
        np.testing.assert_allclose([got[:, c].mean(), got[:, c].std()], [goal.mean(), goal.std()], rtol=1e-9)


def test_align_scale_forgets_a_positive_affine_change_of_the_student_and_keeps_the_teacher_out():
    student = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = align.align_scale(student, teacher)
    assert not expected.requires_grad
    torch.testing.assert_close(align.align_scale(5 * student - 2, teacher), expected)
    torch.testing.assert_close(align.align_scale(teacher.detach() / 3 + 1, teacher), teacher.detach())


def test_align_scale_of_a_constant_map_is_the_teachers_mean():
    got = align.align_scale(torch.full((1, 2, 3, 3), 1e4, dtype=torch.bfloat16), torch.randn(1, 2, 3, 3).bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, got[..., :1, :1].expand_as(got), rtol=0, atol=0)


def test_align_scale_needs_one_number_of_channels():
    with pytest.raises(ValueError, match=r"channels must agree, not 3 \(student\) and 4 \(teacher\)"):
        align.align_scale(torch.rand(1, 3, 2, 2), torch.rand(1, 4, 2, 2))


@pytest.mark.parametrize("of_images", [False, True])
def test_class_means_against_loops(of_images):
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    target = torch.randint(-1, 4, (2, 4, 5))
    target[0, 0], target[1][target[1] == 2] = 255, 0
    means, present = align.class_means(features, target, 5, of_images=of_images)
    parts = [[0], [1]] if of_images else [[0, 1]]
    assert means.shape == (len(parts), 5, 3)
    for part, images in enumerate(parts):
        for k in range(5):
            found = [
                features[b, :, i, j] for b in images for i in range(4) for j in range(5) if int(target[b, i, j]) == k
            ]
            assert bool(present[part, k]) == bool(found)
            expected = torch.stack(found).mean(0) if found else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(means[part, k], expected)


def test_cosines_are_inner_products_of_unit_vectors():
    first, second = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    first[:, :, 0, 0], second[:, :, 1, 1] = 0, 0
    first[0, :, 2, 2] = torch.tensor([0.0, 6e-5, 8e-5])  # just of the least length
    first[1, :, 2, 2] = torch.tensor([0.0, 6e-6, 8e-6])  # shorter than that
    expected = (align.unit_vectors(first) * align.unit_vectors(second)).sum(1)
    torch.testing.assert_close(align.cosines(first, second), expected)
    assert expected[0, 2, 2].abs() > 0
    first.requires_grad_()
    found, wanted = (
        torch.autograd.grad(f(first, second).sum(), first)[0]
        for f in (align.cosines, lambda x, y: (align.unit_vectors(x) * align.unit_vectors(y)).sum(1))
    )
    torch.testing.assert_close(found, wanted)
