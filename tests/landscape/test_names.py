"""Names of version 0.1 still work, and say what they are now."""

import pytest

from lightning_mnn import landscape


@pytest.mark.parametrize(
    ("old", "new"),
    [("Survey", "NetworkStatistics"), ("judge_curvature", "check_curvature"), ("SecondOrderKind", "Kind")],
)
def test_a_former_name_gives_the_same_object_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"lightning_mnn.landscape.{old} is now {new}"):
        assert getattr(landscape, old) is getattr(landscape, new)


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'Surveys'"):
        _ = landscape.Surveys
