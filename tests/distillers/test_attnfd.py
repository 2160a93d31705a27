# SPDX-License-Identifier: Apache-2.0
"""AttnFD against numpy and loops, the two attentions and the levels that it adds up."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import AttnFD, attnfd_loss
from kdlvfm.distillers.attnfd import CBAM, refine


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher):
    first, second = student.flatten().tolist(), teacher.flatten().tolist()
    lengths = [math.sqrt(sum(v * v for v in x)) for x in (first, second)]
    return sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(first, second, strict=True)) / len(student)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def refined(x, channel_gate, spatial_gate):
    """One sample at a time; the gates turn what was pooled into logits."""
    result = []
    for sample in x.detach().numpy():
        mean, peak = sample.mean((1, 2)), sample.max((1, 2))
        sample = sample * sigmoid(channel_gate(mean, peak))[:, None, None]
        result.append(sample * sigmoid(spatial_gate(sample.mean(0), sample.max(0))))
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 4, 5), (3, 2, 1, 7)])
def test_function_against_loops(shape):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2, scale=9.0)
    assert attnfd_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9)


def test_it_is_one_minus_the_cosine():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    cosine = F.cosine_similarity(student.flatten(), teacher.flatten(), dim=0)
    torch.testing.assert_close(attnfd_loss(student, teacher), (2 - 2 * cosine) / 2)


def test_worked_example():
    """Directions (3, 4) / 5 and (1, 0): 0.16 + 0.64."""
    student, teacher = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), torch.tensor([7.0, 0.0]).view(1, 1, 1, 2)
    assert attnfd_loss(student, teacher).item() == pytest.approx(0.8, rel=1e-6)


def test_zero_at_equality_and_at_most_four_over_the_batch():
    teacher = maps(2, 3, 4, 5)
    assert attnfd_loss(teacher, teacher).item() == 0
    assert attnfd_loss(-teacher, teacher).item() == pytest.approx(2, rel=1e-12)
    for seed in range(10):
        assert 1e-3 < attnfd_loss(maps(2, 3, 4, 5, seed=100 + seed), teacher).item() < 2


def test_a_scale_of_either_whole_side_changes_nothing_that_of_one_sample_does():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    expected = attnfd_loss(student, teacher)
    torch.testing.assert_close(attnfd_loss(700 * student, teacher / 9), expected)
    one = student * torch.tensor([700.0, 1.0]).view(2, 1, 1, 1)
    assert attnfd_loss(one, teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_gradcheck():
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: attnfd_loss(x, teacher), (student,), raise_exception=True)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        attnfd_loss(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


def test_refinement_against_numpy():
    x = maps(2, 3, 4, 5, scale=2.0)
    expected = refined(x, lambda mean, peak: mean + peak, lambda mean, peak: mean + peak)
    torch.testing.assert_close(refine(x), expected)


def test_refinement_worked_example():
    """One channel, values 0 and 2: the first gate is that of 1 + 2, the second that of twice what comes out."""
    x = torch.tensor([0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    after_channels = 2 / (1 + math.exp(-3))
    expected = after_channels / (1 + math.exp(-2 * after_channels))
    assert refine(x).flatten().tolist() == pytest.approx([0.0, expected], rel=1e-12)


def test_cbam_against_numpy():
    torch.manual_seed(0)
    cbam = CBAM(32).double().eval()
    x = maps(2, 32, 4, 5)
    first, _, second = cbam.channel
    conv, norm = cbam.spatial
    norm.running_mean.fill_(0.1), norm.running_var.fill_(0.5)
    assert first.weight.shape == (2, 32)

    def perceptron(pooled):
        hidden = np.maximum(first.weight.detach().numpy() @ pooled + first.bias.detach().numpy(), 0)
        return second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()

    def spatial(mean, peak):
        kernel, padded = conv.weight.detach().numpy()[0], np.pad(np.stack([peak, mean]), ((0, 0), (3, 3), (3, 3)))
        summed = [[(kernel * padded[:, i : i + 7, j : j + 7]).sum() for j in range(5)] for i in range(4)]
        return (np.array(summed) - 0.1) / math.sqrt(0.5 + 1e-5)

    expected = refined(x, lambda mean, peak: perceptron(mean) + perceptron(peak), spatial)
    torch.testing.assert_close(cbam(x).detach(), expected)


@pytest.mark.parametrize("dims", [1, 8, 15])
def test_a_narrow_map_keeps_one_hidden_unit(dims):
    assert CBAM(dims).channel[0].out_features == 1


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_adds_its_levels(resize, target):
    torch.manual_seed(0)
    attnfd = AttnFD(
        [3, 4], [5, 6], student_taps=["map.0", "map.1"], teacher_taps=["map.2", "map.3"], resize=resize, target=target
    ).double()
    student = {"map.0": maps(2, 3, 6, 4, seed=1), "map.1": maps(2, 4, 3, 2, seed=2)}
    teacher = {"map.2": maps(2, 5, 3, 8, seed=3, scale=4.0), "map.3": maps(2, 6, 3, 8, seed=4, scale=4.0)}
    sizes = {"larger": [(6, 8), (3, 8)], "student": [(3, 8), (3, 8)], "teacher": [(6, 4), (3, 2)]}[resize]
    axes = {"standardize": (0, 2, 3), "layernorm": (1,)}
    expected = 0.0
    for (x, y), size, projector in zip(
        zip(student.values(), teacher.values(), strict=True), sizes, attnfd.projectors, strict=True
    ):
        if target != "raw":
            eps = 1e-5 if target == "layernorm" else 0.0
            var, mean = torch.var_mean(y, axes[target], keepdim=True, unbiased=False)
            y = (y - mean) / (var + eps).sqrt()
        y = refined(y, lambda mean, peak: mean + peak, lambda mean, peak: mean + peak)
        cbam, conv, _ = projector
        x = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], cbam(x)).detach()
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt()
        pair = []
        for z in (x, y):
            if z.shape[2:] != size:
                shrinks = any(new < old for new, old in zip(size, z.shape[2:], strict=True))
                z = F.interpolate(z, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
            pair.append(z)
        expected += reference(*pair)
    terms = attnfd(student, teacher)
    assert list(terms) == ["attnfd"]
    assert terms["attnfd"].item() == pytest.approx(2 * expected, rel=1e-8)


def test_one_map_of_the_teacher_may_serve_all_levels():
    attnfd = AttnFD([3, 4], [5, 5], student_taps=["map.0", "map.1"], teacher_taps=["map.-1", "map.-1"])
    terms = attnfd(
        {"map.0": torch.rand(2, 3, 8, 8), "map.1": torch.rand(2, 4, 4, 4)}, {"map.-1": torch.rand(2, 5, 4, 4)}
    )
    assert terms["attnfd"].isfinite()


def test_student_and_networks_get_a_gradient_and_the_teacher_none():
    attnfd = AttnFD([3], [5], student_taps=["map.0"], teacher_taps=["map.0"]).double()
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 2, 2, seed=2).requires_grad_()
    attnfd({"map.0": student}, {"map.0": teacher})["attnfd"].backward()
    assert (student.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in attnfd.parameters())
    assert teacher.grad is None


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_autocast_at_extreme_values(value, batch, dtype, target):
    attnfd = AttnFD([3], [5], student_taps=["map.0"], teacher_taps=["map.0"], target=target)
    student = torch.full((batch, 3, 4, 4), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = attnfd({"map.0": student}, {"map.0": torch.full((batch, 5, 2, 2), -value, dtype=dtype)})["attnfd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *attnfd.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_of_the_function(value, dtype):
    student = torch.full((1, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    loss = attnfd_loss(student, -torch.ones_like(student))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4.0 if value else 1.0, rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("names", [{"student_taps": ["map.0"]}, {"teacher_taps": ["map.0", "map.1"]}])
def test_levels_that_do_not_pair_up_are_refused(names):
    with pytest.raises(ValueError, match=r"each level needs one of these.*3 teacher_dims, \d student_taps"):
        AttnFD([3, 4, 5], [6, 7, 8], **names)
    with pytest.raises(ValueError, match="each level needs one"):
        AttnFD([], [], student_taps=[], teacher_taps=[])


def test_from_context_reads_all_dimensions(context):
    attnfd = AttnFD.from_context(context)
    assert [projector[1].weight.shape[:2] for projector in attnfd.projectors] == [(7, 4), (9, 6), (12, 8)]
    attnfd = AttnFD.from_context(context, student_taps=["map.0"], teacher_taps=["decoder"], loss_weight=1.0)
    assert [projector[1].weight.shape[:2] for projector in attnfd.projectors] == [(24, 4)]
    assert (attnfd.student_taps, attnfd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        AttnFD.from_context(context, student_taps=["map.3"], teacher_taps=["map.0"])


def test_dimensions_that_are_given_are_not_read(context):
    taps = {"student_taps": ["module:stages.0"], "teacher_taps": ["map.0"]}
    (projector,) = AttnFD.from_context(context, **taps, student_dims=[31]).projectors
    assert projector[1].weight.shape[:2] == (7, 31)
