# SPDX-License-Identifier: Apache-2.0
import pytest

from kdlvfm.cli import CommandError
from kdlvfm.cli.config import compose
from kdlvfm.cli.search_space import Choice, Range, Space


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1..8", Range("a", 1, 8, log=False)),
        ("a=1.0..8", Range("a", 1.0, 8, log=False)),
        ("a=-.5..1e3", Range("a", -0.5, 1000.0, log=False)),
        ("a=1e-4..1:log", Range("a", 1e-4, 1, log=True)),
        ("distiller=kd,sckd:kd+cwd", Choice("distiller", ("kd", "sckd:kd+cwd"))),
        ("a=[1,2],null", Choice("a", ("[1,2]", "null"))),
    ],
)
def test_what_varies(override, expected):
    (found,) = Space([override, "seed=3", "out=../runs", "data.root=..", "b=[1,2]", "c='x..y/z'"]).dimensions.values()
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(expected, Range):
        assert [type(found.low), type(found.high)] == [type(expected.low), type(expected.high)]
    assert list(Space([f"{expected.key}={found}"]).dimensions.values()) == [found]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a=8..1", "a=8..1 is an empty range"),
        ("a=1..1", "a=1..1 is an empty range"),
        ("a=0..1:log", "a logarithmic scale begins above 0, not at 0"),
        ("a=-1..1:log", "a logarithmic scale begins above 0, not at -1"),
        ("a=1..8:lgo", "has no scale 'lgo': write LOW..HIGH, or LOW..HIGH:log"),
        ("a=0.1..ten", "a=0.1..ten is no range"),
        ("a=..8", "a=..8 is no range"),
        ("a=0..inf", "inf is no end"),
        ("a=interval(0, 1)", "write LOW..HIGH"),
        ("seed=0..3", "a search has one seed"),
        ("seed=0,1", "a search has one seed"),
        ("out=a,b", "give one value"),
        ("launcher.time=10..20", "give one value"),
    ],
)
def test_ranges_that_are_none(override, said):
    with pytest.raises(CommandError) as error:
        Space([override])
    assert said in str(error.value)


def test_a_key_has_one_range():
    with pytest.raises(CommandError, match="a has two ranges"):
        Space(["a=1..2", "b=1", "a=3,4"])


class Highest:
    """Draws the upper end, with the digits of a float."""

    def suggest_float(self, name, low, high, *, log):
        return high * (1 - 1e-9)

    def suggest_int(self, name, low, high, *, log):
        return high

    def suggest_categorical(self, name, choices):
        return choices[-1]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=1..8", "8"),
        ("a=0.1..0.98767", "0.98767"),
        ("a=0.1..10:log", "10.0"),
        ("a=1e-9..2e-5", "2e-05"),
        ("a=x,y", "y"),
    ],
)
def test_values_are_short_and_in_the_range(override, value):
    (dimension,) = Space([override]).dimensions.values()
    assert dimension.draw(Highest()) == value


@pytest.mark.parametrize(
    "overrides",
    [
        ("+recipe.groups.student.clip_norm=0.1..1.0",),
        ("distiller=kd,cwd", "distiller.loss_weight=0.1..10:log"),
        ("recipe.steps=5..50", "recipe.optimizer.betas=[0.9,0.99],[0.8,0.99]"),
        ("student.encoder.name=test_resnet,test_vit", "data.labelled=8..16"),
    ],
)
def test_whatever_changes_a_result_can_vary(overrides, small):
    kept = [one for one in small if one.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    space = Space([*kept, *overrides])
    config = space.check(build=False)
    assert config == compose(space.overrides(space.start))
    assert len(space.dimensions) == len(overrides)
