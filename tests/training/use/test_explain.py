"""`ggam-fast explain` draws what the classifier computes, for all images or for none."""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.data.image_set import eval_transform, read_image
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run.train import train
from ggam_fast.training.use import explain as explanation
from ggam_fast.training.use.explain import ExplainConfig, explain, figure_names, look
from tests.training.conftest import write_image
from tests.training.runs import said


@pytest.fixture
def run(tiny_config, report):
    train(tiny_config, report)
    return tiny_config.run.out


@pytest.fixture
def unguided(tiny_config, report, elsewhere):
    config = replace(tiny_config, optim=replace(tiny_config.optim, guidance_weight=0.0, seed=3))
    train(elsewhere(config, "unguided"), report)
    return elsewhere(config, "unguided").run.out


def test_what_is_drawn_is_what_the_classifier_computes(run, photos):
    checkpoint = load_checkpoint(run)
    image = read_image(photos / "red" / "3.png")
    inputs = eval_transform(*checkpoint.model.backbone.preprocessing)(image)[None]
    seen = look(checkpoint, image, None, torch.device("cpu"))
    with torch.no_grad():
        features = checkpoint.model.backbone(inputs)
        logits = checkpoint.model(inputs)[0]
    torch.testing.assert_close(seen.probabilities, logits.softmax(0))
    assert seen.of == logits.argmax()
    # By autograd, Grad-CAM is relu of the channels weighted by the mean derivative of the logit.
    asked = 1
    features = features.clone().requires_grad_()
    checkpoint.model.head(features)[0, asked].backward()
    beta = features.grad.mean((2, 3), keepdim=True)
    expected = (beta * features).sum(1).relu()[0].detach()
    torch.testing.assert_close(look(checkpoint, image, asked, torch.device("cpu")).grad_cam, expected)
    # The picture is the crop that the network sees, without the normalisation.
    size, _, _, resize = checkpoint.model.backbone.preprocessing
    plain = eval_transform(size, (0.0,) * 3, (1.0,) * 3, resize)(image).permute(1, 2, 0)
    torch.testing.assert_close(seen.picture, plain.clamp(0, 1), atol=1e-5, rtol=0)


def test_one_figure_an_image_and_two_runs_side_by_side(run, unguided, photos, report, tmp_path, monkeypatch):
    drawn = []
    draw = explanation.draw

    def spy(name, seen, labels, classes):
        drawn.append((name, seen, labels))
        return draw(name, seen, labels, classes)

    monkeypatch.setattr(explanation, "draw", spy)
    images = (photos / "red" / "0.png", photos / "blue" / "0.png", photos / "blue" / "1.png")
    config = ExplainConfig(images, run, unguided, out=tmp_path / "figures", device="cpu")
    paths = explain(config)
    assert [path.name for path in paths] == ["red-0.png.png", "blue-0.png.png", "1.png"]
    sizes = {Image.open(path).size for path in paths}
    # The figure has the image, two maps of each run, the bars, and below them the key of the colours.
    assert sizes == {(round(100 * (2.5 * 5 + 4.2)), 365)}
    assert [labels for _, _, labels in drawn] == [["guidance 0.001", "no guidance"]] * 3
    # Both runs show the class that the first one predicts.
    assert all(seen[0].of == seen[1].of == seen[0].probabilities.argmax() for _, seen, _ in drawn)
    assert any(not seen[0].grad_cam.allclose(seen[1].grad_cam) for _, seen, _ in drawn)
    assert said(report).count("no guidance: ") == 3


def test_long_names_stay_in_their_places_and_the_key_shows_the_colours(run, photos):
    checkpoint = load_checkpoint(run)
    seen = [look(checkpoint, read_image(photos / "red" / "3.png"), None, torch.device("cpu"))] * 2
    classes = ["W" * 90, "a rather long name of one class " * 4, "犬" * 40]
    figure = explanation.draw("photo " * 30, seen, ["runs/" + "long" * 30, "runs/" + "long" * 31], classes)
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    *panels, key = sorted(boxes, key=lambda box: -box.y1)
    panels.sort(key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(panels))
    assert 0 <= panels[0].x0 < panels[-1].x1 <= figure.bbox.width
    assert key.y1 < min(box.y0 for box in panels)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["lowest", "highest"]


def test_a_class_can_be_asked_for(run, photos, report, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        explanation, "look", lambda *arguments: asked.append(arguments[2]) or look(*arguments)
    )
    config = ExplainConfig((photos / "red" / "0.png",), run, class_name="green", out=tmp_path / "figures")
    explain(config)
    assert asked == [1]


def test_names_of_figures(tmp_path):
    paths = [tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.jpg", tmp_path / "y.png"]
    assert figure_names(paths) == ["a-x.jpg.png", "b-x.jpg.png", "y.png"]
    assert figure_names([tmp_path / "x.jpg", tmp_path / "x.png"]) == [
        f"{tmp_path.name}-x.jpg.png",
        f"{tmp_path.name}-x.png.png",
    ]
    with pytest.raises(TrainError, match=r"would both be drawn as"):
        figure_names([tmp_path / "x.jpg", tmp_path / "x.jpg"])


def test_bad_input_is_one_line_and_draws_nothing(run, unguided, photos, tmp_path, capsys):
    good = photos / "red" / "0.png"
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    write_image(tmp_path / "other" / "one" / "0.png", 0, 0)

    def refused(*arguments):
        capsys.readouterr()
        out = tmp_path / "figures"
        assert main(["explain", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ggam-fast: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    assert "bad.jpg: not an image file" in refused(good, bad, "--run", run)
    assert "gone.jpg: no such file" in refused(good, tmp_path / "gone.jpg", "--run", run)
    assert "red: " in refused(photos / "red", "--run", run)
    assert "needs one or more image files" in refused("--run", run)
    assert "--class-name must be one of blue, green, red; got pink" in refused(
        good, "--run", run, "--class-name", "pink"
    )
    assert "no checkpoint at" in refused(good, "--run", tmp_path)


def test_small_images_and_other_classes_are_refused(tiny_config, run, photos, report, tmp_path):
    (photos / "red").rename(photos / "rouge")
    other = replace(tiny_config, run=replace(tiny_config.run, out=tmp_path / "other"))
    train(other, report)
    with pytest.raises(TrainError, match="must have the same classes"):
        explain(ExplainConfig((photos / "blue" / "0.png",), run, other.run.out))
    with pytest.raises(TrainError, match=r"0.png \(28 x 20\) is smaller than the crop of 64 x 64"):
        explanation.read(photos / "blue" / "0.png", 64)


def test_the_banner_that_training_cut_off_is_cut_off(run, photos):
    checkpoint = load_checkpoint(run)
    image = read_image(photos / "red" / "3.png")
    spoilt = Image.new("RGB", (image.width, image.height + 20), "white")
    spoilt.paste(image)
    checkpoint.description["data"]["banner"] = 20
    seen = look(checkpoint, spoilt, None, torch.device("cpu"))
    checkpoint.description["data"]["banner"] = 0
    assert seen.probabilities.equal(look(checkpoint, image, None, torch.device("cpu")).probabilities)
