"""A cell is trained from its seed, and its numbers are those of its own head."""

import torch

from ggam_fast import GGAMHead
from ggam_fast.training.ablation.cell import CellData, run_cell
from ggam_fast.training.ablation.study import Cell
from ggam_fast.training.data.batches import MapBatches
from ggam_fast.training.model.backbones import create_backbone
from ggam_fast.training.run.prepare import load_images


def test_a_control_is_trained_with_its_map_and_measured_as_the_others_are(study, monkeypatch):
    images = load_images(study.data)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    data = CellData(images, backbone, torch.device("cpu"), torch.float32, thresholds=3)
    torch.manual_seed(0)
    labels = images.labels[images.splits["test"]]
    maps = torch.rand(len(labels), backbone.num_features, *backbone.feat_size)
    batches = {
        split: MapBatches(maps, labels, min(4, len(labels)), torch.device("cpu"), seed)
        for split, seed in (("train", 0), ("val", None), ("test", None), ("shifted", None))
    }
    measured = []
    classify = GGAMHead.forward

    def spy(head, *arguments, **keywords):
        measured.append((head.training, head.cam_at))
        return classify(head, *arguments, **keywords)

    monkeypatch.setattr(GGAMHead, "forward", spy)
    training = study.training(Cell("spatial", "gaussian", 3.0, 5))
    found = run_cell(training, data, batches, lambda: None, "gaussian")
    # beta is that of the attended map while the control is trained, and that of the features afterwards.
    assert (True, "attended") in measured
    assert (True, "features") not in measured
    assert (False, "features") in measured
    assert found["epochs"][-1]["guidance"] > 0
    assert found["val"] == found["test"] == found["shifted"]
    again = run_cell(training, data, batches, lambda: None, "gaussian")
    assert again["test"] == found["test"]
    assert len(found["pictures"]["attention"]) == len(found["pictures"]["rows"])
