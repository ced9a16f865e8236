"""Images and heat maps are drawn on axes, and names are drawn as text."""

import numpy as np
import torch

from ggam_fast.training.show.figures import (
    NOTHING,
    colour_key,
    new_figure,
    overlay,
    show_heat,
    show_image,
)


def test_a_heat_map_lies_over_the_picture_in_grey():
    picture = torch.rand(8, 12, 3)
    heat = torch.zeros(2, 3)
    heat[1, 2] = 1
    axes = new_figure(2, 2).subplots()
    show_heat(axes, picture, heat)
    grey, over = axes.images
    assert torch.from_numpy(grey.get_array().data).allclose(picture.mean(-1))
    fine = torch.from_numpy(over.get_array().data)
    assert fine.shape == (8, 12)
    assert fine[7, 11] == fine.max() == 1
    assert fine[:2].max() == 0
    # The picture stays visible where the map is low.
    assert over.get_alpha()[0, 0] < 0.2
    assert 0.5 < over.get_alpha()[7, 11] < 0.7
    axes.figure.canvas.draw()
    shown = torch.from_numpy(axes.get_images()[1].make_image(axes.figure.canvas.get_renderer())[0].copy())
    assert shown[..., 3].float().mean() < 128


def test_pixels_without_a_figure_are_those_of_the_figure():
    torch.manual_seed(0)
    picture, heat = torch.rand(16, 16, 3), torch.rand(4, 4)
    figure = new_figure(0.16, 0.16)
    figure.set_layout_engine("none")
    show_heat(figure.add_axes((0, 0, 1, 1)), picture, heat)
    figure.canvas.draw()
    shown = torch.from_numpy(np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255).float()
    assert shown.shape == picture.shape
    assert overlay(picture, heat).allclose(shown, atol=3 / 255)
    nothing = overlay(picture, torch.zeros(4, 4))
    assert nothing.equal(picture.mean(-1, keepdim=True).expand(16, 16, 3))


def test_a_map_of_zeros_says_so():
    axes = new_figure(2, 2).subplots()
    show_heat(axes, torch.rand(8, 8, 3), torch.zeros(2, 2))
    assert len(axes.images) == 1
    assert [text.get_text() for text in axes.texts] == [NOTHING] == ["no positive evidence"]


def test_an_even_map_is_drawn():
    axes = new_figure(2, 2).subplots()
    show_heat(axes, torch.rand(8, 8, 3), torch.full((2, 2), 0.25))
    assert len(axes.images) == 2
    assert not axes.texts
    axes.figure.canvas.draw()


def test_an_image_has_no_frame():
    axes = new_figure(2, 2).subplots()
    show_image(axes, torch.rand(4, 4, 3))
    assert not axes.get_xticks().size
    assert not any(spine.get_visible() for spine in axes.spines.values())


def test_the_key_runs_from_lowest_to_highest():
    figure = new_figure(2, 2)
    colour_key(figure.subfigures(1, 1), (0.1, 0.1, 0.8, 0.2))
    (axes,) = figure.subfigs[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["lowest", "highest"]
    assert axes.images[1].get_array()[0].tolist() == sorted(axes.images[1].get_array()[0].tolist())
