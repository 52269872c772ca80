import torch
from matplotlib.figure import Figure

from lightning_mnn.loggers.media import log_histogram, log_image


def test_a_picture_goes_to_the_loggers_that_can_show_it(tmp_path):
    figure = Figure()
    figure.savefig(tmp_path / "a.png")
    taken = []

    class Pictures:
        def log_image(self, key, images, step):
            taken.append((key, images, step))

    class Board:
        class experiment:  # noqa: N801 (TensorBoard's attribute)
            @staticmethod
            def add_image(name, picture, step, dataformats):
                taken.append((name, picture.shape[-1], step, dataformats))

    assert log_image(Pictures(), "figure", tmp_path / "a.png", 3)
    assert log_image(Board(), "figure", tmp_path / "a.png", 4)
    assert not log_image(object(), "figure", tmp_path / "a.png", 5)
    assert taken == [("figure", [str(tmp_path / "a.png")], 3), ("figure", 4, 4, "HWC")]


def test_a_histogram_goes_to_the_loggers_that_can_show_it():
    taken = []

    class Board:
        class experiment:  # noqa: N801 (TensorBoard's attribute)
            @staticmethod
            def add_histogram(name, values, step):
                taken.append((name, values.tolist(), step))

    assert log_histogram(Board(), "units", torch.tensor([1.0, 2.0]), 4)
    assert not log_histogram(object(), "units", torch.tensor([1.0]), 5)  # to W&B: see test_angular_volume_monitor
    assert taken == [("units", [1.0, 2.0], 4)]
