import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from bigdet.config.model import ModelConfig
from bigdet.models.backbones.build import build_backbone, freeze_stages
from bigdet.models.backbones.vgg import VGG
from bigdet.models.build import build_detector


def test_features_are_torchvisions_with_the_same_weights() -> None:
    ours = VGG()
    with torch.device("meta"):
        theirs = vgg16(weights=None).features[:-1]  # conv5_3, without the last pooling
    theirs.load_state_dict(ours.features.state_dict(), assign=True)
    images = torch.rand(1, 3, 64, 96)
    (found,) = ours(images)
    torch.testing.assert_close(found, theirs(images))


@pytest.mark.parametrize("size", [(32, 64), (33, 70)])
def test_the_map_has_stride_16_rounded_up(size: tuple[int, int]) -> None:
    backbone = build_backbone("vgg16", "none", 0.0)
    (found,) = backbone(torch.rand(1, 3, *size))
    assert found.shape == (1, 512, -(-size[0] // 16), -(-size[1] // 16))
    assert (backbone.channels, backbone.strides) == ([512], [16])


def test_stages_are_the_five_groups_of_convolutions() -> None:
    backbone = VGG()
    sizes = [sum(isinstance(layer, nn.Conv2d) for layer in stage) for stage in backbone.stages]
    assert sizes == [2, 2, 3, 3, 3]
    freeze_stages(backbone, 2)
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trained[0] == "features.10.weight"  # conv3_1
    assert len(trained) == 2 * 9


def test_activations_keep_their_size_with_the_first_weights() -> None:
    # On normalized pixels, N(0, 1): ReLU halves the mean square and MSRA's fan-in doubles it, so
    # that conv5_3 has a mean square of about 1, as the image has, but for its zero padding. With
    # the fan-out its deviation was 0.11.
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    deviations = []
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            deviations.append(VGG()(images)[0].std().item())
    assert all(0.5 < deviation < 3 for deviation in deviations), deviations
    config = ModelConfig(detector="faster_rcnn", backbone="vgg16", norm="none", fc_width=1024)
    detector = build_detector(config, 80)
    hidden = torch.randn(16, 512, 7, 7).relu().permute(0, 2, 3, 1).flatten(1)
    for layer in detector.box_head.fcs:  # fc6 and fc7 keep the mean square too
        before = hidden.square().mean()
        hidden = layer(hidden).relu()
        assert 0.8 < (hidden.square().mean() / before).item() < 1.25
