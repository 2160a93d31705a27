# SPDX-License-Identifier: Apache-2.0
"""RSD against numpy, worked examples, the properties of the formula, and its two kinds of samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdlvfm.distillers import RSD, rsd, rsd_loss

# Authors' epsilon: standardised columns fall short of unit variance by about this much.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher, kappa):
    """One pair of dimensions at a time."""
    s, t = student.detach().numpy(), teacher.detach().numpy()
    total = 0.0
    for i in range(t.shape[1]):
        for j in range(s.shape[1]):
            first = (t[:, i] - t[:, i].mean()) / (np.std(t[:, i]) + 1e-5)
            second = (s[:, j] - s[:, j].mean()) / (np.std(s[:, j]) + 1e-5)
            entry = np.mean(first * second)
            total += (entry - 1) ** 2 if i == j else kappa * entry**2
    return total


@pytest.mark.parametrize("kappa", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (3, 7)])
def test_function_against_numpy(shape, kappa):
    student, teacher = normal(*shape, seed=1, scale=5.0), normal(*shape, seed=2) + 3
    assert rsd_loss(student, teacher, kappa).item() == pytest.approx(reference(student, teacher, kappa), rel=1e-9)


def test_worked_examples():
    line = torch.tensor([[1.0], [-2.0], [4.0]], dtype=torch.float64)
    assert rsd_loss(line, -line).item() == pytest.approx(4, rel=1e-4)
    collinear = torch.cat([line, 3 * line + 1], dim=1)
    assert rsd_loss(collinear, collinear, kappa=0.25).item() == pytest.approx(2 * 0.25, rel=1e-4)
    decorrelated = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert rsd_loss(decorrelated, decorrelated, kappa=1.0).item() == pytest.approx(0, abs=1e-8)
    assert rsd_loss(normal(6, 4), normal(6, 4), kappa=0.0).item() == pytest.approx(0, abs=1e-7)


def test_a_positive_affine_change_of_a_dimension_of_either_changes_nothing():
    student, teacher = normal(9, 4, seed=1), normal(9, 4, seed=2)
    scale, offset = normal(4, seed=3).abs() + 0.5, normal(4, seed=4)
    expected = rsd_loss(student, teacher)
    torch.testing.assert_close(rsd_loss(student * scale + offset, teacher), expected, **CLOSE)
    torch.testing.assert_close(rsd_loss(student, teacher * scale + offset), expected, **CLOSE)


def test_dimensions_and_samples_may_be_permuted_jointly_only():
    student, teacher = normal(9, 4, seed=1), normal(9, 4, seed=2)
    expected = rsd_loss(student, teacher)
    dims, samples = torch.tensor([2, 0, 3, 1]), torch.tensor([8, 1, 0, 4, 3, 2, 7, 6, 5])
    torch.testing.assert_close(rsd_loss(student[samples][:, dims], teacher[samples][:, dims]), expected)
    assert abs(rsd_loss(student[:, dims], teacher) - expected) > 0.01
    assert abs(rsd_loss(student[samples], teacher) - expected) > 0.01


def test_per_dim_divides_by_the_dimensions():
    student, teacher = normal(9, 4, seed=1), normal(9, 4, seed=2)
    torch.testing.assert_close(rsd_loss(student, teacher, reduction="per_dim"), rsd_loss(student, teacher) / 4)


def test_gradcheck():
    student, teacher = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2)
    assert torch.autograd.gradcheck(lambda x: rsd_loss(x, teacher, 0.3), (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spike", [0.0, 1.0, 1e4])
def test_half_precision_at_extreme_values(spike, dtype):
    """Samples equal but for one spike; under autocast the product stays in float32."""
    student = torch.full((3, 3), 1e4, dtype=dtype)
    student[0] -= spike
    teacher = -student.clone()
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = rsd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rsd_loss(student.detach().double(), teacher.double()).float(), rtol=1e-4, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["pooled", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_constant_maps(dtype, mode):
    distiller = RSD(3, 5, mode=mode)
    student = torch.full((3, 3, 2, 2), 1e4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = distiller({"map.-1": student}, {"map.-1": torch.full((3, 5, 4, 4), -1e4, dtype=dtype)})["rsd"]
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *distiller.parameters()))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\) \(student\) and \(4, 5\) \(teacher\)"):
        rsd_loss(normal(4, 3), normal(4, 5))
    with pytest.raises(ValueError, match=r"one shape \(B, D\)"):
        rsd_loss(normal(4, 3, 2, 2), normal(4, 3, 2, 2))
    with pytest.raises(ValueError, match="one sample has no correlations"):
        rsd_loss(normal(1, 3), normal(1, 3))
    with pytest.raises(ValueError, match="reduction must be"):
        rsd_loss(normal(4, 3), normal(4, 3), reduction="mean")
    with pytest.raises(ValueError, match="mode must be"):
        RSD(3, 5, mode="gap")


def test_one_image_is_too_few_for_pooled_and_enough_for_dense():
    student, teacher = {"map.-1": torch.rand(1, 3, 2, 2)}, {"map.-1": torch.rand(1, 5, 4, 4)}
    with pytest.raises(ValueError, match="mode=dense"):
        RSD(3, 5)(student, teacher)
    assert RSD(3, 5, mode="dense")(student, teacher)["rsd"].isfinite()


def test_from_three_images_on_the_gradient_is_of_one_size():
    """Whatever the scale of what the images differ by: it is divided by that in any case."""

    def length(count, seed):
        torch.manual_seed(seed)
        distiller, images = RSD(64, 192), (torch.rand(64) + 0.1 * torch.randn(count, 64)).requires_grad_()
        distiller({"map.-1": images}, {"map.-1": torch.randn(count, 192)})["rsd"].backward()
        return images.grad.norm().item()

    few, many = (np.median([length(count, seed) for seed in range(5)]) for count in (3, 64))
    assert many < few < 30 * many


def test_the_head_is_that_of_the_paper():
    head = RSD(3, 5).projector
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
    assert (head[0].weight.shape, head[3].weight.shape) == ((6, 3), (5, 6))
    assert head[0].bias is head[3].bias is None
    wide = rsd.AAD(200, 300, expansion=1)
    assert wide[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_pooled_averages_maps_and_takes_embeddings_as_they_are():
    distiller = RSD(3, 5, loss_weight=2.0).double()
    student, teacher = normal(6, 3, 2, 3, seed=1), normal(6, 5, 4, 4, seed=2)
    terms = distiller({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["rsd"]
    expected = 2 * reference(distiller.projector(student.mean((2, 3))), teacher.mean((2, 3)), 0.01)
    assert terms["rsd"].item() == pytest.approx(expected, rel=1e-9)
    embeddings = distiller({"map.-1": student.mean((2, 3))}, {"map.-1": teacher.mean((2, 3))})
    torch.testing.assert_close(embeddings["rsd"], terms["rsd"])


def test_dense_takes_every_position_as_a_sample():
    distiller = RSD(3, 5, mode="dense", loss_weight=1.0).double()
    student, teacher = normal(2, 3, 4, 4, seed=1), normal(2, 5, 4, 4, seed=2)
    rows = [x.permute(0, 2, 3, 1).reshape(32, -1) for x in (student, teacher)]
    expected = reference(distiller.projector(rows[0]), rows[1], 0.01)
    assert distiller({"map.-1": student}, {"map.-1": teacher})["rsd"].item() == pytest.approx(expected, rel=1e-9)


def test_dense_draws_the_same_positions_of_both_maps_image_by_image():
    distiller = RSD(1, 1, mode="dense", positions=5)
    numbered = torch.arange(2 * 12.0).view(2, 1, 3, 4)
    torch.manual_seed(0)
    first, second = distiller._positions(numbered, numbered)
    assert torch.equal(first, second)
    halves = [half.flatten().tolist() for half in first.chunk(2)]
    assert [len(set(half)) for half in halves] == [5, 5]
    assert all(value < 12 for value in halves[0])
    assert all(value >= 12 for value in halves[1])
    assert [value + 12 for value in halves[0]] != halves[1]


def test_gathering_correlates_over_the_batches_of_all_processes(monkeypatch):
    """The other process is played by one that holds twice the values."""
    monkeypatch.setattr(rsd, "gather_batch", lambda x: torch.cat([x, 2 * x]))
    student, teacher = {"map.-1": normal(4, 3, seed=1)}, {"map.-1": normal(4, 5, seed=2)}
    distiller = RSD(3, 5, loss_weight=1.0, gather=True).double()
    both = [torch.cat([x, 2 * x]) for x in (student["map.-1"], teacher["map.-1"])]
    both[0] = distiller.projector(both[0])
    assert distiller(student, teacher)["rsd"].item() == pytest.approx(reference(*both, 0.01), rel=1e-9)


@pytest.mark.parametrize("mode", ["pooled", "dense"])
def test_student_and_head_get_a_gradient_and_the_teacher_none(mode):
    distiller = RSD(3, 5, mode=mode)
    student, teacher = (torch.randn(4, dim, 2, 2, requires_grad=True) for dim in (3, 5))
    distiller({"map.-1": student}, {"map.-1": teacher})["rsd"].backward()
    assert teacher.grad is None
    assert all((x.grad != 0).any() for x in (student, *distiller.parameters()))


def test_batches_too_small_are_found_before_training(context):
    with pytest.raises(ValueError, match="2 of them"):
        RSD.from_context(replace(context, batch_shape=(2, 32, 32)))
    for shape, mode in (((3, 32, 32), "pooled"), ((1, 32, 32), "dense"), (None, "pooled")):
        assert RSD.from_context(replace(context, batch_shape=shape), mode=mode).mode == mode


def test_from_context_reads_both_dimensions(context):
    assert RSD.from_context(context).projector[3].weight.shape == (12, 16)
    distiller = RSD.from_context(context, student_tap="pooled", teacher_tap="decoder", expansion=3)
    assert distiller.projector[3].weight.shape == (24, 24)
