from pathlib import Path

import pytest

from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["model.drop_path=0.1"], "model.drop_path", "resnet10 has no drop path"),
        (["model.norm=none", "model.norm_scope=all"], "model.norm_scope", "norm is none"),
        (["model.rpn.anchor_sizes=[32]"], "model.rpn.anchor_sizes", "five sizes"),
        (["evaluation.tta={scales: []}"], "evaluation.tta.scales", "above 0"),
        (["evaluation.tta={scales: [800], cap: 700}"], "evaluation.tta.cap", "at least 800"),
        (["evaluation.tta={vote_iou: 0}"], "evaluation.tta.vote_iou", "in (0, 1]"),
        (["evaluation.tta={}", "evaluation.resize={kind: direct, size: 64}"], "evaluation.resize",
         "with test-time augmentation the sizes are"),
        (["model.retina.nms_iou=0.6"], "model.retina.nms_iou", "is for retinanet"),
        (["model.rpn.train_candidates=0"], "model.rpn.train_candidates", "above 0"),
        (["model.rpn.low_quality_iou=1.5"], "model.rpn.low_quality_iou", "in [0, 1]"),
        (["model.rpn.border=-1"], "model.rpn.border", "0 or more"),
        (["model.rpn.num_convs=0"], "model.rpn.num_convs", "above 0"),
        (["model.roi.nms_sigma=0.3"], "model.roi.nms_sigma", "is for nms: gaussian"),
        (["model.roi.nms=gaussian", "model.roi.nms_sigma=0"], "model.roi.nms_sigma", "above 0"),
        (["model.roi.nms=gaussian", "model.roi.nms_iou=0.6"], "model.roi.nms_iou",
         "is for nms: hard or linear"),
        (["model.relative_positions=true"], "model.relative_positions",
         "resnet10 has no choice of relative positions"),
        (["model.backbone=vit_s", "model.norm=ln", "model.norm_scope=backbone"], "model.norm",
         "for the backbone only"),
        (["model.roi.sampling_ratio=-1"], "model.roi.sampling_ratio", "0 or more"),
        (["model.roi.crowd_coverage=70"], "model.roi.crowd_coverage", "in [0, 1]"),
        (["model.keypoint.min_visible=20"], "model.keypoint.min_visible", "for keypoint_rcnn"),
        (["data.train.min_keypoints=1"], "data.train.min_keypoints", "for keypoint_rcnn"),
        (["evaluation.precise_bn=0"], "evaluation.precise_bn", "above 0"),
        (["phases.pretrain.norm_mode=affine", "phases.pretrain.start_from.source=timm",
          "evaluation.precise_bn=9"], "evaluation.precise_bn", "no phase has norm_mode live"),
        (["phases.pretrain.bias_lr_factor=0"], "phases.pretrain.bias_lr_factor", "above 0"),
        (["phases.pretrain.layer_decay=0"], "phases.pretrain.layer_decay", "in (0, 1]"),
        (["phases.pretrain.layer_decay=1.1"], "phases.pretrain.layer_decay", "in (0, 1]"),
        (["phases.pretrain.ema.decay=1"], "phases.pretrain.ema.decay", "in (0, 1)"),
        (["phases.finetune.decay_norms=true"], "phases.finetune.decay_norms", "is trained here"),
        (["phases.pretrain.resize.draw=image"], "phases.pretrain.resize.draw", "short_side"),
        (["phases.finetune.resize.draw=image", "phases.finetune.resize.pad_to=two_shapes"],
         "phases.finetune.resize.draw", "pad_to: batch"),
        (["model.backbone=vgg16"], "model.norm", "has no normalization"),
        (["model.backbone=vgg16", "model.norm=none"], "model.width", "as wide as vgg16's"),
        (["model.roi.nms_iou=1.5"], "model.roi.nms_iou", "in [0, 1]"),
        (["engine.zero_stage=4"], "engine.zero_stage", "0, 1, 2 or 3"),
        (["engine.zero_stage=null"], "engine.zero_stage", "0, 1, 2 or 3"),
        (["engine.kind=fsdp"], "engine.zero_stage", "has no stages"),
        (["engine.kind=fsdp", "engine.zero_stage=null", "engine.offload=optimizer"],
         "engine.offload", "all or none"),
        (["engine.zero_stage=0", "engine.offload=optimizer"], "engine.offload", "at least 1"),
        (["engine.offload=all"], "engine.offload", "at least 3"),
        (["checkpoint.keep_every=150"], "checkpoint.keep_every", "multiple of checkpoint.every"),
        (["checkpoint.remote=bucket/run"], "checkpoint.remote", "an address, such as s3://bucket"),
        (["checkpoint.every=0"], "checkpoint.every", "above 0"),
        (["log.profile.steps=[5,5]"], "log.profile.steps", "the first one lower"),
        (["log.profile.steps=[0,5]"], "log.profile.steps", "the first one lower"),
        (["log.profile.steps=[5,9999]"], "log.profile.steps", "two steps of a phase"),
        (["data.workers=-1"], "data.workers", "0 or more"),
        (["data.cache.gib=0"], "data.cache.gib", "above 0"),
        (["data.cache.folder=''"], "data.cache.folder", "a folder"),
        (["data.val.shards='pipe:cat /data'"], "data.val.shards", "{} in the command"),
        (["data.train.shards='pipe:cat /data/{}'", "data.cache.mode=ranges"], "data.cache.mode",
         "data.train.shards is a pipe:"),
        (["phases.pretrain.steps=0"], "phases.pretrain.steps", "above 0"),
        (["phases.pretrain.steps=50"], "phases.pretrain.warmup_steps", "50 steps"),
        (["phases.pretrain.steps=null", "phases.pretrain.images=799"],
         "phases.pretrain.warmup_steps", "the phase has 50 steps"),  # 49.9 of 16 images
        (["phases.finetune.warmup_steps=68"], "phases.finetune.warmup_steps",
         "drops after 67 of 100 steps"),  # the default, at 2/3
        (["phases.finetune.warmup_steps=30", "phases.finetune.drops=[-80,-20]"],
         "phases.finetune.warmup_steps", "drops after 20 of 100 steps"),
        (["phases.pretrain.drops=[10]"], "phases.pretrain.drops", "schedule: step"),
        (["phases.finetune.drops=[10,10]"], "phases.finetune.drops", "rising"),
        (["phases.finetune.drops=[10,2000]"], "phases.finetune.drops", "below"),
        (["phases.finetune.drops=[-10,-20]"], "phases.finetune.drops", "rising"),
        (["phases.finetune.drops=[-200]"], "phases.finetune.drops", "above 0"),
        (["phases.finetune.passes=3"], "phases.finetune.passes", "steps: 100 and passes: 3.0"),
        (["phases.finetune.steps=null"], "phases.finetune.steps", "found none"),
        (["phases.finetune.steps=null", "phases.finetune.passes=3",
          "phases.finetune.drops=[1,3]"], "phases.finetune.drops", "below the phase's 3 passes"),
        (["phases.finetune.steps=null", "phases.finetune.images=0"], "phases.finetune.images",
         "above 0"),
        (["phases.pretrain.schedule=cosine", "phases.pretrain.decay_factor=0.5"],
         "phases.pretrain.decay_factor", "schedule: step"),
        (["phases.finetune.reference_images_per_step=0"],
         "phases.finetune.reference_images_per_step", "above 0"),
        (["checkpoint.at=[train-10]"], "checkpoint.at", "pretrain, finetune"),
        (["checkpoint.at=[finetune-101]"], "checkpoint.at", "one of its steps"),
        (["phases.pretrain.images_per_step=12"], "phases.pretrain.images_per_step", "multiple"),
        (["phases.pretrain.resize.size=100"], "phases.pretrain.resize.size", "multiple of 32"),
        (["phases.pretrain.resize.cap=200"], "phases.pretrain.resize.cap", "short_side"),
        (["phases.finetune.resize.cap=64"], "phases.finetune.resize.cap", "at least size"),
        (["phases.finetune.resize.cap=128", "phases.finetune.resize.sizes=[96,160]"],
         "phases.finetune.resize.cap", "at least size, 160"),
        (["phases.finetune.resize.sizes=[]"], "phases.finetune.resize.sizes", "above 0"),
        (["phases.finetune.resize.sizes=[96]", "phases.finetune.resize.size_range=[96,128]"],
         "phases.finetune.resize.size_range", "sizes is set instead"),
        (["phases.finetune.resize.size_range=[128,96]"],
         "phases.finetune.resize.size_range", "rising"),
        (["phases.pretrain.resize.sizes=[96]"], "phases.pretrain.resize.sizes", "short_side"),
        (["phases.finetune.resize.variant=paper"], "phases.finetune.resize.variant", "direct"),
        (["phases.pretrain.resize.pad_to=two_shapes"], "phases.pretrain.resize.pad_to", "stitcher"),
        (["phases.pretrain.resize.divide_by=4"], "phases.pretrain.resize.divide_by", "stitcher"),
        (["phases.finetune.resize.kind=stitcher", "phases.finetune.resize.divide_by=1"],
         "phases.finetune.resize.divide_by", "2 or more"),
        (["phases.pretrain.resize.kind=jitter", "phases.pretrain.resize.scale_range=[0.5,1]"],
         "phases.pretrain.resize.scale_range", "direct"),
        (["phases.pretrain.resize.jitter_range=[0.5,1]"], "phases.pretrain.resize.jitter_range",
         "jitter"),
        (["phases.pretrain.resize.kind=jitter", "phases.pretrain.resize.size=100"],
         "phases.pretrain.resize.size", "multiple of 32"),
        (["evaluation.resize.kind=short_side", "evaluation.resize.size=96",
          "evaluation.resize.sizes=[96]"], "evaluation.resize.sizes", "is for training"),
        (["phases.pretrain.augment.mosaic=2"], "phases.pretrain.augment.mosaic", "in [0, 1]"),
        (["phases.pretrain.augment.mosaic=0.5", "phases.pretrain.images_per_gpu=2"],
         "phases.pretrain.augment.mosaic", "at least 4"),
        (["phases.pretrain.augment.copy_paste=0.5", "phases.pretrain.images_per_gpu=1"],
         "phases.pretrain.augment.copy_paste", "at least 2"),
        (["model.detector=faster_rcnn", "phases.pretrain.augment.copy_paste=0.5"],
         "phases.pretrain.augment.copy_paste", "does not learn masks"),
        (
            ["phases.finetune.resize.scale_range=[0.5,1]"],
            "phases.finetune.resize.scale_range",
            "direct",
        ),
        (["phases.finetune.optimizer=adamw", "phases.finetune.momentum=0.5"],
         "phases.finetune.momentum", "is for optimizer: sgd"),
        (["phases.pretrain.norm_mode=null"], "phases.pretrain.norm_mode", "the model has BN"),
        (["model.norm=gn"], "phases.pretrain.norm_mode", "has no BN"),
        (["phases.pretrain.norm_mode=fixed"], "phases.pretrain.norm_mode", "never trained"),
        (["phases.pretrain.freeze_stages=1"], "phases.pretrain.freeze_stages", "3 AP"),
        (["phases.pretrain.start_from.source=previous"], "phases.pretrain.start_from.source",
         "first phase"),
        (["phases.pretrain.start_from.parts=[fpn]"], "phases.pretrain.start_from.parts", "random"),
        (["model.detector=faster_rcnn", "phases.finetune.start_from.parts=[mask_head]"],
         "phases.finetune.start_from.parts", "faster_rcnn has no mask_head"),
        (["phases.finetune.start_from.parts=[fpn]"], "phases.finetune.norm_mode", "backbone"),
        (["phases.finetune.start_from.source=timm", "phases.finetune.start_from.parts=[fpn]"],
         "phases.finetune.start_from.parts", "backbone only"),
        (["phases.finetune.start_from.cost.preset=imagenet"], "phases.finetune.start_from.cost",
         "the source is previous"),
        (["phases.pretrain.start_from.source=x", "phases.pretrain.start_from.cost={}"],
         "phases.pretrain.start_from.cost", "is empty"),
        (["phases.pretrain.start_from.source=x", "phases.pretrain.start_from.cost.images=-1"],
         "phases.pretrain.start_from.cost.images", "above 0"),
        (["phases.pretrain.start_from.source=x", "phases.pretrain.start_from.cost.images=10",
          "phases.pretrain.start_from.cost.preset=imagenet"],
         "phases.pretrain.start_from.cost.images", "preset: imagenet sets it"),
        (["phases.finetune.start_from.source=timm:x.y", "phases.finetune.start_from.parts=[fpn]"],
         "phases.finetune.start_from.parts", "timm:x.y has weights of the backbone only"),
        (["phases.finetune.start_from.source=timm",
          "phases.finetune.start_from.parts=[backbone,box_head]"],
         "phases.finetune.start_from.parts", "found backbone, box_head, but timm has weights"),
        (["phases.finetune.start_from.source=a.pth", "phases.finetune.start_from.parts=[fpn]"],
         "phases.finetune.start_from.parts", "a.pth has weights of the backbone only"),
        (["phases.pretrain.start_from.source=a.pkl"], "phases.pretrain.start_from.pixels",
         "bgr_255"),
        (["phases.pretrain.start_from.source=a.pth", "phases.pretrain.start_from.pixels=rgb"],
         "phases.pretrain.start_from.pixels", "for .pkl files"),
        (["model.norm_scope=all", "phases.pretrain.norm_mode=fixed",
          "phases.pretrain.start_from.source=a.pth"], "phases.pretrain.norm_mode",
         "loaded into fpn, mask_head"),
        (["model.roi.box_beta=0.5"], "model.roi.box_beta", "box_loss: smooth_l1"),
        (["model.roi.box_loss_weight=0"], "model.roi.box_loss_weight", "above 0"),
        (["model.rpn.box_beta=-1"], "model.rpn.box_beta", "0 or more"),
        (["model.keypoint.width=64"], "model.keypoint.width", "is for keypoint_rcnn"),
        (
            ["model.backbone=resnet18", "model.stride_in_1x1=true"],
            "model.stride_in_1x1", "resnet18 has no blocks with 1x1 convolutions",
        ),
        (["model.detector=keypoint_rcnn", "model.keypoint.num_keypoints=0"],
         "model.keypoint.num_keypoints", "above 0"),
        (["model.cascade.gradients=mmdet"], "model.cascade.gradients", "cascade_mask_rcnn"),
        (["model.detector=cascade_rcnn", "model.roi.positive_iou=0.6"], "model.roi.positive_iou",
         "0.5, 0.6 and 0.7"),
        (["model.detector=faster_rcnn", "phases.finetune.model.detector=mask_rcnn",
          "phases.finetune.start_from.parts=[backbone,mask_head]"],
         "phases.finetune.start_from.parts", "faster_rcnn, which has no mask_head"),
        (["phases.pretrain.model.detector=cascade_rcnn",
          "phases.finetune.model.detector=faster_rcnn"], "phases.finetune.model.detector",
         "three box heads"),
        (["data.train.weights=[1,2]"], "data.train.weights", "each of 1 sets"),
        (["data.train.weights=[0]"], "data.train.weights", "above 0"),
        (["data.train.repeat_threshold=2"], "data.train.repeat_threshold", "in (0, 1]"),
        (["data.train.window=512"], "data.train.window", "order: windowed"),
        (["data.train.order=windowed", "data.train.window=64"], "data.train.window", "256 to 2048"),
        (["data.train.subset.seed=1"], "data.train.subset", "one of images"),
        (["data.train.subset.images=0"], "data.train.subset.images", "above 0"),
        (["data.train.subset.ids=a", "data.train.subset.seed=1"], "data.train.subset.seed",
         "number of images"),
        (["data.train.subset.ids=a", "data.train.more_shards=[b]"], "data.train.subset.ids",
         "mixed"),
    ],
)  # fmt: skip
def test_rules_name_the_key_and_the_reason(overrides: list[str], key: str, reason: str):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart.yaml", overrides)
    assert str(caught.value).startswith(f"{key}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["phases.pretrain.norm_mode=sync"],
        ["phases.finetune.warmup_steps=67"],  # the first drop comes after 67 steps
        ["phases.pretrain.start_from.source=a.pth", "phases.pretrain.freeze_stages=2"],
        ["phases.pretrain.start_from.source=timm:resnet18.x", "phases.pretrain.norm_mode=fixed"],
        ["phases.pretrain.start_from={source: a.pkl, pixels: bgr_255, parts: [backbone]}"],
        [
            "model.backbone=convnext_t",
            "model.drop_path=0.1",
            "model.norm=none",
            "phases.pretrain.norm_mode=null",
            "phases.finetune.norm_mode=null",
        ],
    ],
)
def test_what_these_say_is_allowed(overrides: list[str]):
    load_config(CONFIGS / "quickstart.yaml", overrides)


def test_swin_with_default_norm_has_no_norm_mode():
    load_config(CONFIGS / "swin_t_direct.yaml", ["model.norm=bn"])


def test_a_phase_may_go_on_as_a_cascade():
    overrides = [
        "phases.finetune.model.detector=cascade_mask_rcnn",
        "model.cascade.gradients=mmdet",
    ]
    load_config(CONFIGS / "quickstart.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["model.box_head=4conv1fc"], "model.box_head", "no box head"),
        (["model.neck=simple"], "model.neck", "retinanet has no choice of it"),
        (["model.retina.nms_sigma=0.3"], "model.retina.nms_sigma", "is for nms: gaussian"),
        (["model.rpn.nms_iou=0.6"], "model.rpn.nms_iou", "no proposals"),
        (
            ["model.roi.score_threshold=0.1"],
            "model.roi.score_threshold",
            "no box head on proposals",
        ),
        (["model.norm_scope=all"], "model.norm_scope", "share retinanet's head"),
        (["model.backbone=vgg16"], "model.backbone", "needs a pyramid"),
        (["model.retina.anchor_sizes=[32]"], "model.retina.anchor_sizes", "P3 to P7"),
        (["model.retina.anchor_ratios=[]"], "model.retina.anchor_ratios", "above 0"),
        (["model.retina.scales_per_octave=0"], "model.retina.scales_per_octave", "above 0"),
        (["model.retina.focal_gamma=-1"], "model.retina.focal_gamma", "0 or more"),
        (["model.retina.focal_alpha=2"], "model.retina.focal_alpha", "in [0, 1]"),
        (["model.retina.negative_iou=0.6"], "model.retina.negative_iou", "at most positive_iou"),
        (
            ["phases.finetune.start_from.parts=[rpn]"],
            "phases.finetune.start_from.parts",
            "retinanet has no rpn",
        ),
    ],
)
def test_rules_of_a_retinanet_name_the_key_and_the_reason(
    overrides: list[str], key: str, reason: str
):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "retinanet_r50_direct.yaml", overrides)
    assert str(caught.value).startswith(f"{key}: ")
    assert reason in str(caught.value)
