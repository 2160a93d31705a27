# SPDX-License-Identifier: Apache-2.0
"""An argument that a class does not take is refused with those that it takes."""

import pytest

from kdlvfm.cli import CommandError
from kdlvfm.cli.build import build
from kdlvfm.cli.config import compose
from kdlvfm.cli.targets import explained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distiller=kd", "distiller.temprature=4"], r"^KD takes no 'temprature'\. Did you mean temperature\?$"),
        (
            ["distiller=kd+fitnet", "teacher=digit_scenes_vit", "distiller.parts.fitnet.depth=3"],
            r"^FitNet takes no 'depth'\. It takes student_dim, .*",
        ),
        (["distiller=none", "data.banana=1"], r"^DigitScenes takes no 'banana'\. It takes size, .*batch_size"),
        (["distiller=none", "+recipe.optimizer.momentun=1"], r"^(SGD|AdamW) takes no 'momentun'\. "),
        (["distiller=none", "student.frezee=true"], r"^EncoderHead takes no 'frezee'\. Did you mean freeze\?$"),
    ],
)
def test_what_a_class_does_not_take_is_refused_with_what_it_takes(overrides, message, small):
    with pytest.raises(CommandError, match=message):
        build(compose([*small, *overrides]))


def test_of_a_class_that_stands_in_for_another_the_own_arguments_are_named():
    """KD gives a ScoreKD for boxes."""
    error = TypeError("ScoreKD.__init__() got an unexpected keyword argument 'beata'")
    node = {"_target_": "kdlvfm.distillers.KD.from_context", "_partial_": True}
    assert explained(error, node) == "ScoreKD takes no 'beata'. Did you mean beta?"
