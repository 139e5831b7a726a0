"""And the Bit Goes Down: a network quantised by what it outputs (arXiv 1907.05686)."""

from remanence.compress.layout import Layout, codeword_count, layout_of
from remanence.compress.modules.execution import Choice, Cost, choose_modes, set_mode
from remanence.compress.modules.quant_noise import quant_noise, remove_quant_noise
from remanence.compress.modules.quantised_layer import Mode, QuantisedLayer
from remanence.compress.modules.replace import float_copy, quantised_layers, replace_layers
from remanence.compress.network.explain import explain
from remanence.compress.network.finetune import CurvePoint, finetune
from remanence.compress.network.layers import Layer, find_layers
from remanence.compress.network.pipeline import Compressed, FinishedLayer, LayerReport, compress
from remanence.compress.permutation.permute import Permuted, permute
from remanence.compress.planning.budget import plan_budget
from remanence.compress.planning.plan import LayerPlan, Plan, plan
from remanence.compress.planning.recipe import RECIPES
from remanence.compress.planning.size import Size, size
from remanence.compress.quantised import Quantised
from remanence.compress.quantizer.kmeans import KMeans, kmeans
from remanence.compress.quantizer.moments import Moments, input_rows
from remanence.compress.quantizer.rows import Metric, QuantisedRows, output_error, quantize_rows
from remanence.compress.quantizer.target import bias_correction, teacher_target
from remanence.compress.storage.export import export_onnx
from remanence.compress.storage.file import inspect_file, load, save
from remanence.compress.storage.importers import import_bgd, import_pqf
from remanence.compress.storage.reader import FileInfo
from remanence.compress.storage.stored import as_stored

__all__ = [
    "RECIPES",
    "Choice",
    "Compressed",
    "Cost",
    "CurvePoint",
    "FileInfo",
    "FinishedLayer",
    "KMeans",
    "Layer",
    "LayerPlan",
    "LayerReport",
    "Layout",
    "Metric",
    "Mode",
    "Moments",
    "Permuted",
    "Plan",
    "Quantised",
    "QuantisedLayer",
    "QuantisedRows",
    "Size",
    "as_stored",
    "bias_correction",
    "choose_modes",
    "codeword_count",
    "compress",
    "explain",
    "export_onnx",
    "find_layers",
    "finetune",
    "float_copy",
    "import_bgd",
    "import_pqf",
    "input_rows",
    "inspect_file",
    "kmeans",
    "layout_of",
    "load",
    "output_error",
    "permute",
    "plan",
    "plan_budget",
    "quant_noise",
    "quantised_layers",
    "quantize_rows",
    "remove_quant_noise",
    "replace_layers",
    "save",
    "set_mode",
    "size",
    "teacher_target",
]
