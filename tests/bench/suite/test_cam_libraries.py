"""The published libraries compute the reference's beta."""

import pytest
import torch
from torch import nn

from bench.suite import cam_libraries
from bench.suite.cases import CAM_LIBRARIES, Case
from bench.suite.workload import Workload


@pytest.mark.parametrize("library", CAM_LIBRARIES)
def test_beta(library: str, device: torch.device) -> None:
    pytest.importorskip({"grad_cam": "pytorch_grad_cam"}.get(library, library))
    work = Workload(Case(4, 32, 5, 3, torch.float32), device)
    assert work.check(library, "beta", work.build(library, "beta")) <= 1


def test_torchcam_has_no_tokens() -> None:
    pytest.importorskip("torchcam")
    with pytest.raises(NotImplementedError, match="cannot average tokens"):
        cam_libraries.build("torchcam", nn.Identity(), tokens=True)
