# SPDX-License-Identifier: Apache-2.0
"""What makes a teacher cheaper leaves its features what they are, but for rounding."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlvfm.core import FeatureModel, ModelCard, TapInfo, Teacher

TAPS = ("map.1", "tokens", "pooled", "logits")


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 24)


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_a_batch_in_parts_has_the_features_of_the_whole(toy_model, images, batch):
    model = toy_model()
    whole, parts = Teacher(model)(images, TAPS), Teacher(model, batch=batch)(images, TAPS)
    assert list(parts) == list(TAPS)
    for tap in TAPS:
        torch.testing.assert_close(parts[tap], whole[tap])


def test_the_network_sees_no_more_images_than_that(toy_model, images):
    model, seen = toy_model(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    Teacher(model, batch=2)(images, TAPS)
    assert seen == [2, 2, 1]


def test_features_that_are_not_one_for_each_image_cannot_be_joined(toy_model, images):
    model = toy_model()
    forward = model.forward
    model.forward = lambda images, taps: {"map.0": forward(images, ("map.0",))["map.0"].sum(0, keepdim=True)}
    with pytest.raises(ValueError, match=r"map.0 of \S+ has 3 rows for 5 images: with it a teacher's batch must be"):
        Teacher(model, batch=2)(images, ("map.0",))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_autocast_and_comes_back_in_float32(toy_model, images, precision):
    model = toy_model()
    teacher = Teacher(model, precision=precision)
    with torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        expected = Teacher(model)(images, TAPS)
    assert expected["map.1"].dtype != torch.float32
    exact = Teacher(model)(images, TAPS)
    for tap, value in teacher(images, TAPS).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[tap].float())
        torch.testing.assert_close(value, exact[tap], rtol=0.05, atol=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_single_precision_within_a_student_that_computes_in_half(toy_model, images):
    model = toy_model()
    exact = Teacher(model)(images, TAPS)
    with torch.autocast("cpu", torch.bfloat16):
        found = Teacher(model, precision="fp32")(images, TAPS)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(found[tap], exact[tap]) for tap in TAPS)


def test_what_was_cast_for_the_teacher_is_not_handed_to_a_student_of_another_precision(toy_model, images):
    weight = nn.Parameter(torch.rand(3, 3))

    class Sharing(toy_model):
        def forward(self, images, taps):
            return {"map.0": nn.functional.linear(images.mT, weight)}

    teacher = Teacher(Sharing(), precision="fp16")
    with torch.autocast("cpu", torch.bfloat16):
        teacher(images[:, :, :3], ("map.0",), input_grad=True)
        assert nn.functional.linear(images[:, :, :3].mT, weight).dtype == torch.bfloat16


def test_memory_format_of_the_weights_is_that_of_what_they_compute(toy_model, images):
    model = toy_model()
    expected = Teacher(model)(images, TAPS)
    found = Teacher(model, channels_last=True)(images, TAPS)
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert found["map.1"].is_contiguous(memory_format=torch.channels_last)
    for tap in TAPS:
        torch.testing.assert_close(found[tap], expected[tap])


@pytest.mark.usefixtures("traced")
def test_compiled_features_are_eager_features(toy_model, images):
    model = toy_model()
    teacher, before = Teacher(model, compile=True), list(model.state_dict())
    counters.clear()
    for taps in (TAPS, ("map.-1",), ("logits",)):
        expected = Teacher(model)(images, taps)
        found = teacher(images, taps)
        assert list(found) == list(taps)
        for tap in taps:
            torch.testing.assert_close(found[tap], expected[tap])
    assert counters["stats"]["unique_graphs"] == 3
    assert list(model.state_dict()) == before
    assert "forward" not in vars(model)
    assert teacher.state_dict() == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_generated_code_computes_the_same(toy_model, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = toy_model(), images.clone().requires_grad_()
    torch._dynamo.reset()
    found, expected = (Teacher(model, compile=flag)(x, TAPS, input_grad=True) for flag in (True, False))
    for tap in TAPS:
        torch.testing.assert_close(found[tap], expected[tap], rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(features["logits"].square().sum(), x)[0] for features in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"channels_last": True},
        {"compile": True},
        {"batch": 2},
        {"device": "cpu"},
        {"precision": "bf16", "channels_last": True, "compile": True, "batch": 2, "device": "cpu", "input_size": 16},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.usefixtures("traced")
# The compiler looks whether a part of the batch has a gradient, and hides what torch says of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_gradient_reaches_the_images_through_every_option(toy_model, images, options):
    model = toy_model()
    loose = {"rtol": 0.1, "atol": 0.02} if options.get("precision") == "bf16" else {}

    def gradient(teacher):
        x = images.clone().requires_grad_()
        teacher(x, ("logits",), input_grad=True)["logits"].square().sum().backward()
        return x.grad

    expected = gradient(Teacher(model, input_size=options.get("input_size")))
    torch.testing.assert_close(gradient(Teacher(model, **options)), expected, **loose)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not Teacher(model, **options)(images.requires_grad_(), ("logits",))["logits"].requires_grad


class Scaled(FeatureModel):
    """The images times a buffer, which must be where they are."""

    def __init__(self):
        super().__init__()
        self.card = ModelCard("scaled", "random")
        self.register_buffer("scale", torch.rand(3, 1, 1))

    def taps(self):
        return {"map.0": TapInfo(3, 1)}

    def forward(self, images, taps):
        return {"map.0": images * self.scale}


@pytest.mark.parametrize("batch", [None, 2])
def test_it_stays_on_its_device_and_its_features_do_not(batch):
    """On devices that are only imagined: shapes and places are real, numbers are not there."""
    with FakeTensorMode():
        teacher = Teacher(Scaled(), device="cuda:1", batch=batch)
        images = torch.rand(3, 3, 4, 4, device="cuda:0", requires_grad=True)
        for owner in (nn.ModuleList([teacher]), nn.ModuleList([teacher]).to("cuda:0")):
            assert owner[0].model.scale.device == torch.device("cuda:1")
            for input_grad in (False, True):
                found = teacher(images, ("map.0",), input_grad=input_grad)["map.0"]
                assert (found.device, found.shape) == (images.device, images.shape)
        moved = Teacher(Scaled()).to("cuda:0")
        assert moved(images, ("map.0",))["map.0"].device == images.device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision must be bf16, fp16, fp32 or null, not 'fp8'"),
        ({"batch": 0}, "batch must be a whole number from 1 on, or null, not 0"),
        ({"batch": "two"}, "not 'two'"),
        ({"compile": "yes"}, "compile must be true or false, not 'yes'"),
        ({"channels_last": 1}, "channels_last must be true or false, not 1"),
        ({"device": "gpu"}, "the teacher cannot be on gpu .*: name a device of this machine"),
        ({"device": "cuda:99"}, "the teacher cannot be on cuda:99"),
    ],
)
def test_options_that_cannot_be(toy_model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Teacher(toy_model(), **options)
    assert "\n" not in str(caught.value)
