"""`GGAMTask` in what timm's train script does: its loader on a folder, its optimizer, scaler, EMA, saver."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ggam_fast
from ggam_fast import GGAMLoss

pytest.importorskip("timm.task")
image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
from timm import data, optim, scheduler  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402
from timm.utils import CheckpointSaver, NativeScaler  # noqa: E402

COLOURS = {"blue": (20, 40, 200), "green": (20, 200, 40), "red": (210, 30, 30)}


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    return ggam_fast.create_model("test_resnet", len(COLOURS), hidden_size=16, rd_ratio=0.25, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                image.new("RGB", (40 + index, 40), colour).save(folder / f"{index}.png")
    return tmp_path / "photos"


def loader(photos: Path, split: str, **options: Any) -> Any:
    found = data.create_dataset("", root=str(photos), split=split, is_training=split == "train")
    return data.create_loader(
        found, input_size=(3, 32, 32), batch_size=6, is_training=split == "train", num_workers=0,
        use_prefetcher=False, device=torch.device("cpu"), persistent_workers=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("mixup", [False, True])
def test_a_run_of_timm(mixup: bool, photos: Path, tmp_path: Path) -> None:
    """The steps of timm's train.py: loss.backward through its scaler, EMA, evaluation, checkpoint, resume."""
    mix = data.Mixup(mixup_alpha=0.2, num_classes=len(COLOURS)) if mixup else None
    task = ggam_fast.GGAMTask(
        model(cam_norm="standardized"), criterion_kwargs={"soft_targets": True} if mixup else None,
        guidance_weight=1e-3, device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(task, ClassificationTask)
    optimizer = optim.create_optimizer_v2(task.trainable_module, opt="adamw", lr=3e-3, layer_decay=0.9)
    schedule, _ = scheduler.create_scheduler_v2(optimizer, num_epochs=8, warmup_epochs=0)
    task.setup_ema(decay=0.5)
    scaler, losses, step = NativeScaler("cpu"), [], 0
    for epoch in range(8):
        task.train()
        for x, y in loader(photos, "train", auto_augment=None):
            x, y = mix(x, y) if mix else (x, y)
            result = task(x, y)
            assert result["output"].shape == (len(x), len(COLOURS))
            optimizer.zero_grad()
            parameters = task.get_clip_parameters()
            scaler(result["loss"], optimizer, clip_grad=1.0, parameters=parameters)
            step += 1
            task.update_ema(step)
            losses.append(result["loss"].item())
        schedule.step(epoch + 1)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in task.trainable_module.parameters())

    for ema in (False, True):
        evaluated = task.get_eval_model(ema=ema).eval()
        with torch.no_grad():
            for x, y in loader(photos, "val"):
                logits = evaluated(x)
                assert logits.shape == (len(x), len(COLOURS))
                assert (logits.argmax(1) == y).float().mean() > 0.5 or ema

    folder = str(tmp_path)
    saver = CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, 0.0)
    again = ggam_fast.GGAMTask(model(cam_norm="standardized"))
    state = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"]
    again.load_checkpoint_state(state)
    x, _ = next(iter(loader(photos, "val")))
    with torch.no_grad():
        assert torch.equal(again.get_eval_model().eval()(x), task.get_eval_model().eval()(x))


def test_the_loss_is_that_of_ggam_loss() -> None:
    trained, x, y = model(), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    task = ggam_fast.GGAMTask(trained.eval(), criterion_kwargs={"smoothing": 0.1}, guidance_weight=0.3)
    result, out = task(x, y), trained(x, y)
    torch.testing.assert_close(result["loss"], GGAMLoss(0.3, label_smoothing=0.1)(out, y))
    torch.testing.assert_close(
        result["classification_loss"], F.cross_entropy(out.logits, y, label_smoothing=0.1).detach()
    )
    torch.testing.assert_close(result["guidance_loss"], out.guidance_loss.detach())
    assert torch.equal(result["output"], out.logits)
    # Of dense targets, each class by itself.
    dense = torch.eye(3)[y]
    bce = ggam_fast.GGAMTask(trained, nn.BCEWithLogitsLoss(), guidance_weight=0.3)
    expected = F.binary_cross_entropy_with_logits(out.logits, dense) + 0.3 * out.guidance_loss
    torch.testing.assert_close(bce(x, dense)["loss"], expected)


def test_compiled() -> None:
    trained, x, y = model().eval(), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    task = ggam_fast.GGAMTask(trained, guidance_weight=0.3)
    expected = task(x, y)["loss"]
    task.compile(backend="eager")
    torch.testing.assert_close(task(x, y)["loss"], expected)
    assert task.get_eval_model()(x).shape == (6, 3)
    assert ggam_fast.explain(task.get_eval_model(), x).cam.shape == (6, 1, 1)


def test_errors() -> None:
    with pytest.raises(TypeError, match="model must have a GGAM head; got Linear: use create_model"):
        ggam_fast.GGAMTask(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"criterion must be a loss on logits.*guidance_weight="):
        ggam_fast.GGAMTask(model(), GGAMLoss(0.1))
    with pytest.raises(ValueError, match="guidance_weight must be"):
        ggam_fast.GGAMTask(model(), guidance_weight=-1.0)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: Any, target: Any = None) -> Any:
            return self.inner(x)

    with pytest.raises(TypeError, match=r"model\(input, target\) must give a GGAMOutput; got Tensor"):
        ggam_fast.GGAMTask(Half())(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
