import pytest
import torch

from remanence.errors import InputError
from remanence.kit.detectors import build_detector, is_detector

SMALL = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"


def test_detectors_are_told_from_classifiers():
    assert is_detector(SMALL)
    assert is_detector("torchvision:maskrcnn_resnet50_fpn")
    for name in ("torchvision:resnet18", "maskrcnn_resnet50_fpn", "resnet18", "torchvision:none"):
        assert not is_detector(name)


def test_one_takes_images_of_any_sizes():
    torch.manual_seed(0)
    model = build_detector(SMALL, 4, {"min_size": 64, "max_size": 96})
    assert not model.training
    with torch.no_grad():
        found = model([torch.rand(3, 40, 60), torch.rand(3, 64, 64)])
    assert len(found) == 2
    assert all(set(each) == {"boxes", "labels", "scores"} for each in found)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


def test_what_it_does_not_take_is_refused_in_one_line():
    with pytest.raises(InputError, match=f"{SMALL}: takes no argument min_sise; .* min_size"):
        build_detector(SMALL, 4, {"min_sise": 64})
    with pytest.raises(InputError, match=f"{SMALL}: cannot be built with .*: 3") as caught:
        build_detector(SMALL, 4, {"box_roi_pool": 3})
    assert "\n" not in str(caught.value)
