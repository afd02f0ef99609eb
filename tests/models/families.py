"""Small models of every family, so that a family added here is tested everywhere."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from iris_hf.models.classifier import append_classifier
from iris_hf.models.contrastive import make_image_text_contrastive_model, split_image_text_model
from iris_hf.models.sources.open_clip import create_open_clip_model
from iris_hf.models.sources.text_encoders import create_hf_text_encoder
from iris_hf.models.sources.timm import create_timm_model
from iris_hf.models.sources.transformers import create_hf_model

NAMES = ["red cell", "white cell", "platelet"]
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_TRANSFORMER = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "num_queries": 10,
}
_DETR = {**_TRANSFORMER, "d_model": 16, "encoder_layers": 1, "backbone_config": {**RESNET, "out_features": ["stage4"]}}
_DEFORMABLE = {**_DETR, "d_model": 32, "backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_RT_DETR = {
    **_TRANSFORMER,
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [16, 16, 16],
    "num_denoising": 4,
    "backbone_config": {**RESNET, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]},
}
_D_FINE = {
    **_RT_DETR,
    "backbone_config": {
        "model_type": "hgnet_v2",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "out_features": ["stage2", "stage3", "stage4"],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 8, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 8, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]}
_DPT = {
    **_VIT,
    "num_hidden_layers": 4,
    "patch_size": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        make: Makes a small model with random weights.
        target_type: What it is for.
        size: Edge of the square images it is tested with.
        idle: Parts of the names of parameters that the library itself never trains.
    """

    make: Callable[[], Any]
    target_type: str
    size: int = 32
    idle: tuple[str, ...] = ()


def _hf(
    model_type: str, target_type: str, config: dict[str, Any], size: int = 32, idle: tuple[str, ...] = ()
) -> Family:
    def make() -> Any:
        return create_hf_model(model_type, target_type=target_type, class_names=NAMES, pretrained=False, config=config)

    return Family(make, target_type, size, idle)


def _timm(name: str, config: dict[str, Any], target_type: str = "multiclass") -> Family:
    def make() -> Any:
        return create_timm_model(name, num_classes=3, class_names=NAMES, config=config, target_type=target_type)

    return Family(make, target_type)


def _appended() -> Any:
    encoder = create_timm_model("resnet10t")
    classifier = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3, bias=False))
    return append_classifier(encoder, classifier, task_type="multilabel_classification")


FAMILIES = {
    "hf-vit": _hf("vit", "multiclass", _VIT),
    "hf-vit-multilabel": _hf("vit", "multilabel", _VIT),
    "hf-resnet": _hf("resnet", "multiclass", {k: v for k, v in RESNET.items() if k != "model_type"}, size=64),
    "hf-convnext": _hf("convnext", "multiclass", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
    "hf-swin": _hf(
        "swin",
        "multiclass",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2, "window_size": 4},
    ),
    "hf-mobilevit": _hf("mobilevit", "multiclass", _MOBILEVIT, size=64),
    "timm-resnet": _timm("resnet10t", {}),
    "timm-vit": _timm("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1}),
    "timm-multilabel": _timm("mobilenetv3_small_050", {}, "multilabel"),
    "append_classifier": Family(_appended, "multilabel"),
    "hf-detr": _hf("detr", "detection", _DETR, size=64),
    "hf-conditional_detr": _hf("conditional_detr", "detection", _DETR, size=64),
    "hf-deformable_detr": _hf("deformable_detr", "detection", _DEFORMABLE, size=128),
    "hf-rt_detr": _hf("rt_detr", "detection", _RT_DETR, size=64),
    "hf-rt_detr_v2": _hf("rt_detr_v2", "detection", _RT_DETR, size=64),
    "hf-d_fine": _hf("d_fine", "detection", _D_FINE, size=64),
    "hf-yolos": _hf("yolos", "detection", {**_VIT, "image_size": [64, 64], "num_detection_tokens": 10}, size=64),
    "hf-segformer": _hf(
        "segformer",
        "segmentation",
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        size=64,
    ),
    "hf-mobilenet_v2": _hf(
        "mobilenet_v2", "segmentation", {"depth_multiplier": 0.25, "image_size": 64}, size=64, idle=("conv_1x1",)
    ),
    "hf-mobilevit-segmentation": _hf("mobilevit", "segmentation", _MOBILEVIT, size=64),
    "hf-mobilevitv2": _hf("mobilevitv2", "segmentation", {"image_size": 64, "width_multiplier": 0.25}, size=64),
    "hf-dpt": _hf("dpt", "segmentation", _DPT, idle=("dpt.layernorm", "fusion_stage.layers.0.residual_layer1")),
    "hf-upernet": _hf(
        "upernet",
        "segmentation",
        {
            "backbone_config": {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "hidden_size": 16,
            "auxiliary_in_channels": 16,
            "auxiliary_channels": 8,
        },
        size=64,
    ),
}
"""Families that train and predict."""

_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    "max_position_embeddings": 12,
}
_CLIP = {
    "text_config": {**_TEXT, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98},
    "vision_config": {**_VIT, "num_hidden_layers": 1},
    "projection_dim": 24,
}
_SIGLIP = {
    "text_config": {**_CLIP["text_config"], "projection_size": 32},
    "vision_config": _CLIP["vision_config"],
}
BERT = {**_TEXT, "type_vocab_size": 2, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
_ROBERTA = {**BERT, "max_position_embeddings": 14, "pad_token_id": 1}
_ALIGN = {
    "text_config": BERT,
    "vision_config": {
        "image_size": 32,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 24,
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 2, 2],
        "depthwise_padding": [],
        "initializer_range": 0.5,  # the default makes features too small to have a direction
    },
    "projection_dim": 8,
}


def _image_text(model_type: str, config: dict[str, Any]) -> Any:
    return create_hf_model(model_type, target_type="image_text", pretrained=False, config=config)


def _open_clip(**config: Any) -> Any:
    small = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2},
    }
    return create_open_clip_model("ViT-B-32", config={**small, **config})


def _dual_encoder(loss: Any) -> Any:
    image_model, text_model = (
        create_timm_model("resnet10t"),
        create_hf_text_encoder("bert", pretrained=False, config=BERT),
    )
    return make_image_text_contrastive_model(
        image_model, text_model, loss=loss, image_feature_dim=512, text_feature_dim=16, projection_dim=8
    )


IMAGE_TEXT = {
    "open_clip": _open_clip,
    "open_clip-siglip": lambda: _open_clip(init_logit_bias=-10.0, init_logit_scale=2.3),
    "timm-bert-clip": lambda: _dual_encoder("clip"),
    "timm-bert-unicl": lambda: _dual_encoder("unicl"),
    "timm-bert-siglip": lambda: _dual_encoder("siglip"),
    "hf-align": lambda: _image_text("align", _ALIGN),
    "hf-clip": lambda: _image_text("clip", _CLIP),
    "hf-metaclip_2": lambda: _image_text("metaclip_2", _CLIP),
    "hf-chinese_clip": lambda: _image_text("chinese_clip", {**_CLIP, "text_config": BERT}),
    "hf-altclip": lambda: _image_text("altclip", {**_CLIP, "text_config": {**_ROBERTA, "project_dim": 20}}),
    "hf-siglip": lambda: _image_text("siglip", _SIGLIP),
}
"""Image-text models. They take images `[N, 3, 32, 32]` and up to 12 tokens below 99."""

TEXT_ENCODERS = {
    "hf-bert": lambda: create_hf_text_encoder("bert", pretrained=False, config=BERT),
    "hf-roberta": lambda: create_hf_text_encoder("roberta", pretrained=False, pooling="cls", config=_ROBERTA),
    "hf-bert-pooler": lambda: create_hf_text_encoder("bert", pretrained=False, pooling="pooler", config=BERT),
}

TOWERS = {
    **IMAGE_TEXT,
    **TEXT_ENCODERS,
    "timm-encoder": lambda: create_timm_model("resnet10t"),
    "split-image": lambda: split_image_text_model(_image_text("clip", _CLIP)).image_model,
    "split-text": lambda: split_image_text_model(_dual_encoder("clip")).text_model,
}
"""Models that have no classes of their own."""


def of_target_type(*target_types: str) -> list[str]:
    """Names of the families that are for one of these target types."""
    return [name for name, family in FAMILIES.items() if family.target_type in target_types]


def make(name: str) -> Any:
    """Make a model of a family, the same at every call."""
    torch.manual_seed(0)
    return FAMILIES[name].make() if name in FAMILIES else TOWERS[name]()


def make_batch(name: str, *, n: int = 2) -> tuple[torch.Tensor, Any]:
    """Random images and targets for a family, the same at every call."""
    torch.manual_seed(1)
    size, target_type = FAMILIES[name].size, FAMILIES[name].target_type
    images = torch.rand(n, 3, size, size)
    if target_type == "multiclass":
        return images, torch.arange(n) % 3
    if target_type == "multilabel":
        return images, torch.randint(0, 2, (n, 3))
    if target_type == "detection":
        boxes = torch.tensor([[1, 0.1, 0.2, 0.5, 0.6], [0, 0.3, 0.3, 0.9, 0.8]])
        return images, [boxes[: 2 - i % 2] for i in range(n)]
    masks = torch.nn.functional.one_hot(torch.randint(0, 3, (n, size, size)), 3).permute(0, 3, 1, 2).float()
    masks[..., :4] = 0  # pixels without a class
    return images, masks


def make_pairs(n: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random images and tokens of uneven length for an image-text model, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 97, (n, 8), generator=generator)
    input_ids[:, -1] = 98
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, 6:] = torch.tensor([98, 1])
    attention_mask[0, 7:] = 0
    images = torch.rand(n, 3, 32, 32, generator=generator)
    return images, {"input_ids": input_ids, "attention_mask": attention_mask}


def make_inputs(name: str) -> Any:
    """Inputs of a tower or an image-text model, the same at every call."""
    images, tokens = make_pairs()
    if name in IMAGE_TEXT:
        return images, tokens
    return tokens if name in TEXT_ENCODERS or name == "split-text" else images
