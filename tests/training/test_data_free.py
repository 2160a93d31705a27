# SPDX-License-Identifier: Apache-2.0
"""Whole runs without data: a run that was stopped ends with the bits of one that was not, pool and generator too."""

from functools import partial

import pytest
import torch

from kdlvfm.core.synthesizer import GROUP
from kdlvfm.distillers import KD, DataFree
from kdlvfm.distillers.synthesizers import ImageGenerator, ImagePool, Noise, Surrogate
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.optimizers import Plans

STEPS = 10
PHOTOGRAPHS = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SYNTHESIZERS = {
    "generator": partial(ImageGenerator, (8, 8), latent=6, width=4, every=2),
    "pool": partial(ImagePool, 6, (8, 8), max_age=2),
    "surrogate": partial(Surrogate, PHOTOGRAPHS),
    "noise": Noise,
}


class CrashError(Exception):
    """Stands for a kill: nothing in the library catches it."""


class Crashing(KD):
    """Fails at one training step."""

    def __init__(self, at_step):
        super().__init__(temperature=2.0)
        self._left = at_step

    def forward(self, student, teacher, target=None):
        self._left -= 1
        if self._left == 0:
            raise CrashError
        return super().forward(student, teacher, target)


@pytest.fixture
def run_once(make_module, make_data, make_plan, small_net, run_fit):
    def run(name, folder, at_step=-1, *, data=None, **settings):
        torch.manual_seed(3)
        method = DataFree(Crashing(at_step), SYNTHESIZERS[name]())
        adam = make_plan(optimizer=partial(torch.optim.Adam, lr=0.01))
        module = make_module(
            steps=STEPS,
            student=small_net(dropout=0.3),
            distiller=method,
            task=Segmentation(3),
            plans=Plans(make_plan(), {GROUP: adam} if name == "generator" else {}),
        )
        return module, run_fit(module, data or make_data(steps=STEPS), folder, checkpoint_every=2, **settings)

    return run


def flat(state):
    """Tensors by name, also those inside an extra state."""
    found = {}
    for key, value in state.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found.update({f"{key}/{name}": x for name, x in inner})
    return found


@pytest.mark.parametrize("name", SYNTHESIZERS)
@pytest.mark.parametrize("at_step", [4, 7])
def test_a_crashed_run_resumes_to_the_same_bits(name, at_step, run_once):
    whole, _ = run_once(name, "whole")
    with pytest.raises(CrashError):
        run_once(name, "crashed", at_step)
    resumed, result = run_once(name, "crashed")
    assert result.finished
    expected, found = flat(whole.state_dict()), flat(resumed.state_dict())
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("name", SYNTHESIZERS)
def test_other_data_make_no_difference(name, run_once, make_data, weights_of):
    one, _ = run_once(name, "one")
    other, _ = run_once(name, "other", data=make_data(steps=STEPS, seed=77))
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=0, atol=0)


def test_what_a_synthesizer_trains_has_its_own_optimizer(run_once):
    module, _ = run_once("generator", "run")
    assert list(module._groups) == ["student", GROUP]
    assert [type(optimizer) for optimizer in module.trainer.optimizers] == [torch.optim.SGD, torch.optim.Adam]
    logged = {name for name in module.trainer.logged_metrics if name.startswith(f"train/{GROUP}/")}
    assert f"train/{GROUP}/adversarial" in logged


def test_half_precision(run_once):
    for name in ("pool", "generator"):
        module, result = run_once(name, name, trainer={"precision": "bf16-mixed"})
        assert result.finished
        assert all(value.isfinite().all() for value in flat(module.state_dict()).values())
