"""The irisml training tasks on the Hugging Face stack.

Names load on first use: `import iris_hf` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from iris_hf._version import __version__ as __version__

if TYPE_CHECKING:
    from iris_hf import irisml as irisml
    from iris_hf import metrics as metrics
    from iris_hf.data.coco import load_coco as load_coco
    from iris_hf.data.coco import save_coco as save_coco
    from iris_hf.data.collate import collate as collate
    from iris_hf.data.convert import to_hf as to_hf
    from iris_hf.data.hf_dataset import from_hf as from_hf
    from iris_hf.data.image_text_transform import make_image_caption_transform as make_image_caption_transform
    from iris_hf.data.image_text_transform import make_image_text_transform as make_image_text_transform
    from iris_hf.data.prompts import build_classification_prompt_dataset as build_classification_prompt_dataset
    from iris_hf.data.prompts import create_classification_prompt_generator as create_classification_prompt_generator
    from iris_hf.data.read_targets import get_targets_from_dataset as get_targets_from_dataset
    from iris_hf.data.sampling import make_oversampled_dataset as make_oversampled_dataset
    from iris_hf.data.sampling import sample_few_shot_dataset as sample_few_shot_dataset
    from iris_hf.data.storage import load_hf_dataset as load_hf_dataset
    from iris_hf.data.storage import save_hf_dataset as save_hf_dataset
    from iris_hf.data.subclass import get_subclass_dataset as get_subclass_dataset
    from iris_hf.engine.plugins.base import Plugin as Plugin
    from iris_hf.engine.plugins.base import PredictState as PredictState
    from iris_hf.engine.plugins.base import RunState as RunState
    from iris_hf.engine.plugins.base import TrainState as TrainState
    from iris_hf.engine.plugins.val_metrics import ValMetrics as ValMetrics
    from iris_hf.errors import ConfigError as ConfigError
    from iris_hf.errors import DataError as DataError
    from iris_hf.errors import IrisHFError as IrisHFError
    from iris_hf.errors import MissingDependencyError as MissingDependencyError
    from iris_hf.export.onnx import OnnxExport as OnnxExport
    from iris_hf.export.onnx import export_onnx as export_onnx
    from iris_hf.export.onnx import export_onnx_model as export_onnx_model
    from iris_hf.export.runtime import load_onnx as load_onnx
    from iris_hf.hub.push_dataset import push_dataset_to_hub as push_dataset_to_hub
    from iris_hf.hub.push_model import push_to_hub as push_to_hub
    from iris_hf.inference.benchmark import BenchmarkResult as BenchmarkResult
    from iris_hf.inference.benchmark import benchmark_model as benchmark_model
    from iris_hf.inference.benchmark import benchmark_table as benchmark_table
    from iris_hf.inference.predictor import predict as predict
    from iris_hf.metrics.classification import evaluate_accuracy as evaluate_accuracy
    from iris_hf.metrics.classification import (
        evaluate_multilabel_average_precision as evaluate_multilabel_average_precision,
    )
    from iris_hf.metrics.detection import evaluate_detection_average_precision as evaluate_detection_average_precision
    from iris_hf.metrics.ranking import evaluate_retrieval as evaluate_retrieval
    from iris_hf.metrics.segmentation import evaluate_mean_iou as evaluate_mean_iou
    from iris_hf.models.classifier import append_classifier as append_classifier
    from iris_hf.models.contrastive import make_image_text_contrastive_model as make_image_text_contrastive_model
    from iris_hf.models.contrastive import split_image_text_model as split_image_text_model
    from iris_hf.models.feature_extractor import make_feature_extractor_model as make_feature_extractor_model
    from iris_hf.models.hub import from_pretrained as from_pretrained
    from iris_hf.models.hub import save_pretrained as save_pretrained
    from iris_hf.models.image_spec import ImageSpec as ImageSpec
    from iris_hf.models.recipe import register_model_factory as register_model_factory
    from iris_hf.models.sources.open_clip import create_open_clip_model as create_open_clip_model
    from iris_hf.models.sources.open_clip import create_tokenizer as create_tokenizer
    from iris_hf.models.sources.text_encoders import create_hf_text_encoder as create_hf_text_encoder
    from iris_hf.models.sources.timm import create_timm_model as create_timm_model
    from iris_hf.models.sources.transformers import create_hf_model as create_hf_model
    from iris_hf.models.transforms import create_image_transform as create_image_transform
    from iris_hf.models.zero_shot import build_zero_shot_classifier as build_zero_shot_classifier
    from iris_hf.training.schedulers import LrSchedulerConfig as LrSchedulerConfig
    from iris_hf.training.trainer import train as train
    from iris_hf.training.trainer import train_with_gradient_cache as train_with_gradient_cache

_HOMES = {
    "iris_hf.data.coco": ["load_coco", "save_coco"],
    "iris_hf.data.collate": ["collate"],
    "iris_hf.data.convert": ["to_hf"],
    "iris_hf.data.hf_dataset": ["from_hf"],
    "iris_hf.data.image_text_transform": ["make_image_caption_transform", "make_image_text_transform"],
    "iris_hf.data.prompts": ["build_classification_prompt_dataset", "create_classification_prompt_generator"],
    "iris_hf.data.read_targets": ["get_targets_from_dataset"],
    "iris_hf.data.sampling": ["make_oversampled_dataset", "sample_few_shot_dataset"],
    "iris_hf.data.storage": ["load_hf_dataset", "save_hf_dataset"],
    "iris_hf.data.subclass": ["get_subclass_dataset"],
    "iris_hf.engine.plugins.base": ["Plugin", "PredictState", "RunState", "TrainState"],
    "iris_hf.engine.plugins.val_metrics": ["ValMetrics"],
    "iris_hf.errors": ["ConfigError", "DataError", "IrisHFError", "MissingDependencyError"],
    "iris_hf.export.onnx": ["OnnxExport", "export_onnx", "export_onnx_model"],
    "iris_hf.export.runtime": ["load_onnx"],
    "iris_hf.hub.push_dataset": ["push_dataset_to_hub"],
    "iris_hf.hub.push_model": ["push_to_hub"],
    "iris_hf.inference.benchmark": ["BenchmarkResult", "benchmark_model", "benchmark_table"],
    "iris_hf.inference.predictor": ["predict"],
    "iris_hf.metrics.classification": ["evaluate_accuracy", "evaluate_multilabel_average_precision"],
    "iris_hf.metrics.detection": ["evaluate_detection_average_precision"],
    "iris_hf.metrics.ranking": ["evaluate_retrieval"],
    "iris_hf.metrics.segmentation": ["evaluate_mean_iou"],
    "iris_hf.models.classifier": ["append_classifier"],
    "iris_hf.models.contrastive": ["make_image_text_contrastive_model", "split_image_text_model"],
    "iris_hf.models.feature_extractor": ["make_feature_extractor_model"],
    "iris_hf.models.hub": ["from_pretrained", "save_pretrained"],
    "iris_hf.models.image_spec": ["ImageSpec"],
    "iris_hf.models.recipe": ["register_model_factory"],
    "iris_hf.models.sources.open_clip": ["create_open_clip_model", "create_tokenizer"],
    "iris_hf.models.sources.text_encoders": ["create_hf_text_encoder"],
    "iris_hf.models.sources.timm": ["create_timm_model"],
    "iris_hf.models.sources.transformers": ["create_hf_model"],
    "iris_hf.models.transforms": ["create_image_transform"],
    "iris_hf.models.zero_shot": ["build_zero_shot_classifier"],
    "iris_hf.training.schedulers": ["LrSchedulerConfig"],
    "iris_hf.training.trainer": ["train", "train_with_gradient_cache"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("irisml", "metrics")

__all__ = ["__version__", *_MODULES, *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"iris_hf.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
