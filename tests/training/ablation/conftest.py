"""A small study on the photos of the training tests."""

import pytest


@pytest.fixture
def study(tmp_path, photos):
    from ggam_fast.training.ablation.study import AblateConfig, StudyConfig
    from ggam_fast.training.config.options import DataConfig

    return AblateConfig(
        data=DataConfig("folder", photos, 64, cache_dir=tmp_path / "cache", enlarge=True),
        study=StudyConfig(
            out=tmp_path / "study",
            seeds=(1, 2),
            choice_seeds=(0,),
            attentions=("none", "spatial", "channel_spatial"),
            guidances=("none", "standardized"),
            guidance_weights=(0.1, 1.0),
            position_weights=(1.0,),
            backbone="test_resnet",
            pretrained=False,
            hidden_size=0,
            epochs=1,
            batch_size=8,
            device="cpu",
            compile=False,
        ),
    )
