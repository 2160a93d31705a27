# SPDX-License-Identifier: Apache-2.0
"""VkD against loops over elements and numpy, and the orthogonality of the projector that it trains."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.core.projectors import OrthogonalProjector
from kdlvfm.distillers import VkD, vkd_loss


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def normalised(teacher, normalization):
    """In numpy."""
    values = teacher.numpy()
    if normalization == "raw":
        return values
    axes, eps = ((1,), 1e-5) if normalization == "layernorm" else ((0, *range(2, values.ndim)), 0.0)
    return (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + eps)


def reference(projected, teacher, normalization):
    """One element at a time."""
    distances = [
        abs(a - b)
        for a, b in zip(projected.flatten().tolist(), normalised(teacher, normalization).ravel(), strict=True)
    ]
    return sum(d * d / 2 if d < 1 else d - 0.5 for d in distances) / len(distances)


@pytest.mark.parametrize("normalization", ["raw", "layernorm", "standardize"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 4, 2, 1), (6, 7)])
def test_function_against_loops(shape, normalization):
    projected, teacher = features(*shape, seed=1, scale=2.0), features(*shape, seed=2, scale=5.0) + 3
    expected = reference(projected, teacher, normalization)
    assert vkd_loss(projected, teacher, normalization).item() == pytest.approx(expected, rel=1e-9)


def test_layernorm_is_the_default():
    projected, teacher = features(2, 3, 4, 5, seed=1), features(2, 3, 4, 5, seed=2, scale=5.0)
    assert torch.equal(vkd_loss(projected, teacher), vkd_loss(projected, teacher, "layernorm"))


def test_worked_example():
    """Normalised to (-1, 1), half a unit and two units away: 1/8 and 3/2."""
    teacher = torch.tensor([[1.0, 2001.0]], dtype=torch.float64)
    projected = torch.tensor([[-0.5, 3.0]], dtype=torch.float64)
    assert vkd_loss(projected, teacher).item() == pytest.approx((0.125 + 1.5) / 2, abs=1e-9)


def test_zero_exactly_where_the_normalised_teacher_is_met():
    teacher = features(2, 6, 3, 3, scale=4.0)
    assert vkd_loss(F.layer_norm(teacher.movedim(1, -1), (6,)).movedim(-1, 1), teacher).item() == 0
    for seed in range(10):
        assert vkd_loss(features(2, 6, 3, 3, seed=100 + seed), teacher).item() > 1e-2


def test_layernorm_forgets_the_scale_and_offset_of_a_position_and_standardize_those_of_a_channel():
    projected, teacher = features(2, 6, 3, 3, seed=1), features(2, 6, 3, 3, seed=2, scale=50.0)
    position, channel = features(2, 1, 3, 3, seed=3).abs() + 1, features(1, 6, 1, 1, seed=4).abs() + 1
    for normalization, scale in (("layernorm", position), ("standardize", channel)):
        changed = vkd_loss(projected, scale * teacher - 7 * scale, normalization)
        torch.testing.assert_close(changed, vkd_loss(projected, teacher, normalization), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalization", ["raw", "layernorm", "standardize"])
def test_gradcheck(normalization):
    projected, teacher = features(2, 3, 2, 2, seed=1).requires_grad_(), features(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: vkd_loss(x, teacher, normalization), (projected,), raise_exception=True)


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(4, 9), (5, 5), (9, 4)])
def test_the_projector_is_orthogonal_and_stays_so_while_it_is_trained(student_dim, teacher_dim):
    torch.manual_seed(0)
    projector = OrthogonalProjector(student_dim, teacher_dim).double()
    initial = projector.weight.detach().clone()
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    x, goal = features(8, student_dim, seed=1), features(8, teacher_dim, seed=2)
    for _ in range(20):
        weight = projector.weight.detach()
        assert weight.shape == (teacher_dim, student_dim)
        gram = weight.T @ weight if teacher_dim >= student_dim else weight @ weight.T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-13)
        optimizer.zero_grad()
        (projector(x) - goal).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(projector.weight, initial, atol=0.05)


def test_the_projector_moves_smoothly():
    """A column that passes through zero in its first entry, where a plain QR decomposition changes its sign."""
    projector = OrthogonalProjector(2, 4).double()
    weights = []
    for entry in (1e-9, -1e-9):
        projector.matrix.data = torch.tensor([[entry, 0.3], [1.0, 0.2], [0.5, 2.0], [0.1, 0.7]], dtype=torch.float64)
        weights.append(projector.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(2, 4), (3, 3), (4, 2)])
def test_gradcheck_of_the_projector(student_dim, teacher_dim):
    projector, x = OrthogonalProjector(student_dim, teacher_dim).double(), features(2, student_dim)

    def projected(matrix):
        return torch.func.functional_call(projector, {"matrix": matrix}, (x,))

    assert torch.autograd.gradcheck(projected, (projector.matrix,), raise_exception=True)


def test_the_projector_keeps_lengths_and_angles_at_every_position():
    torch.manual_seed(0)
    projector, x = OrthogonalProjector(4, 9).double(), features(2, 4, 3, 5)
    projected = projector(x)
    assert projected.shape == (2, 9, 3, 5)
    torch.testing.assert_close(projected.norm(dim=1), x.norm(dim=1))
    dots = [torch.einsum("bchw,bcij->bhwij", y, y) for y in (projected, x)]
    torch.testing.assert_close(*dots)
    by_matrix = torch.einsum("oc,bchw->bohw", projector.weight, x)
    torch.testing.assert_close(projected, by_matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_projector_is_orthogonal_under_autocast(dtype):
    projector, x = OrthogonalProjector(4, 9), features(2, 4, 3, 5).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        projected = projector(x)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=1), x.float().norm(dim=1))


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spike", [0.0, 1e4])
def test_half_precision_at_extreme_values(spike, batch, dtype, target):
    """A constant student, and a teacher that is constant or has one channel of large values."""
    vkd = VkD(2, 3, target=target)
    student, teacher = torch.full((batch, 2, 3, 3), 1e4, dtype=dtype), torch.full((batch, 3, 1, 1), 1e4, dtype=dtype)
    teacher[:, 0] -= 2 * spike
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = vkd({"map.-1": student}, {"map.-1": teacher})["vkd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *vkd.parameters()))


def test_different_shapes_and_unknown_normalisations_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(projected student\) and \(2, 5, 4, 4\) \(teacher\)"):
        vkd_loss(features(2, 3, 4, 4), features(2, 5, 4, 4))
    with pytest.raises(ValueError, match="'whiten'"):
        vkd_loss(features(2, 3), features(2, 3), "whiten")


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_on_maps_of_other_channels_and_size(resize, target):
    vkd = VkD(3, 5, loss_weight=2.0, resize=resize, target=target, student_tap="map.0", teacher_tap="map.1").double()
    student, teacher = features(2, 3, 6, 4, seed=1), features(2, 5, 3, 8, seed=2, scale=9.0)
    projected = torch.einsum("oc,bchw->bohw", vkd.align.projector.weight.detach(), student)
    size = {"larger": (6, 8), "student": (3, 8), "teacher": (6, 4)}[resize]
    pair = []
    for x in (projected, torch.as_tensor(normalised(teacher, target))):
        if x.shape[2:] != size:
            shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        pair.append(x)
    terms = vkd({"map.0": student}, {"map.1": teacher})
    assert list(terms) == ["vkd"]
    assert terms["vkd"].item() == pytest.approx(2 * reference(*pair, "raw"), rel=1e-8)


def test_class_on_pooled_vectors():
    vkd = VkD(3, 5, student_tap="pooled", teacher_tap="pooled").double()
    student, teacher = features(4, 3, seed=1), features(4, 5, seed=2)
    expected = reference(student @ vkd.align.projector.weight.detach().T, teacher, "layernorm")
    assert math.isclose(vkd({"pooled": student}, {"pooled": teacher})["vkd"].item(), expected, rel_tol=1e-9)


def test_student_and_projector_get_a_gradient_and_the_teacher_none():
    vkd = VkD(3, 5).double()
    student, teacher = features(2, 3, 4, 4, seed=1).requires_grad_(), features(2, 5, 2, 2, seed=2).requires_grad_()
    vkd({"map.-1": student}, {"map.-1": teacher})["vkd"].backward()
    assert (student.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in vkd.parameters())
    assert teacher.grad is None


def test_from_context_reads_both_dimensions(context):
    assert VkD.from_context(context).align.projector.weight.shape == (12, 8)
    vkd = VkD.from_context(context, student_tap="pooled", teacher_tap="decoder", loss_weight=2.0)
    assert vkd.align.projector.weight.shape == (24, 8)
    assert (vkd.student_taps, vkd.teacher_taps) == (("pooled",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        VkD.from_context(context, student_tap="map.3")
