"""A recipe is a whole set of options that trains."""

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli.commands import parse_train
from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.config.recipes import RECIPES
from ggam_fast.training.run.train import train


def test_paper_recipe_runs_on_a_small_model(photos, tmp_path, report):
    arguments = ["--recipe", "paper", "--preset", "paper", "--data", "folder", "--root", str(photos)]
    arguments += ["--backbone", "test_resnet", "--no-pretrained", "--image-size", "64", "--resize", "72"]
    arguments += [
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--no-compile",
        "--enlarge",
        "--out",
        str(tmp_path / "out"),
    ]
    config = parse_train([*arguments, "--hidden-size", "16"])
    outcome = train(config, report)
    assert outcome.metrics is not None
    backbone = load_checkpoint(tmp_path / "out").model.backbone
    assert (backbone.image_size, backbone.resize) == (64, 72)


def test_recipes_name_options_and_pass_their_checks():
    known = TrainConfig().values()
    assert set(RECIPES) == {"modern", "paper"}
    for recipe in RECIPES.values():
        assert recipe.keys() <= known.keys()
        TrainConfig().replaced(recipe).check()
    assert RECIPES["modern"] == {}
    paper = TrainConfig().replaced(RECIPES["paper"])
    assert (paper.backbone.backbone, paper.backbone.finetune) == ("resnet50", True)
    assert (paper.data.image_size, paper.data.resize) == (448, 600)
    assert (paper.optim.lr, paper.optim.backbone_lr, paper.optim.weight_decay) == (0.01, 0.001, 5e-4)
    assert (paper.optim.optimizer, paper.optim.schedule) == ("sgd", "cosine")
    assert (paper.optim.batch_size, paper.optim.epochs) == (16, 100)
