"""And the Bit Goes Down: a network quantised by what it outputs (arXiv 1907.05686)."""

from remanence.compress.budget import plan_budget
from remanence.compress.execution import Choice, Cost, choose_modes, set_mode
from remanence.compress.explain import explain
from remanence.compress.export import export_onnx
from remanence.compress.file import inspect_file, load, save
from remanence.compress.finetune import CurvePoint, finetune
from remanence.compress.importers import import_bgd, import_pqf
from remanence.compress.kmeans import KMeans, kmeans
from remanence.compress.layers import Layer, find_layers
from remanence.compress.layout import Layout, codeword_count, layout_of
from remanence.compress.modules import float_copy, quantised_layers, replace_layers
from remanence.compress.moments import Moments, input_rows
from remanence.compress.permute import Permuted, permute
from remanence.compress.pipeline import Compressed, FinishedLayer, LayerReport, compress
from remanence.compress.plan import LayerPlan, Plan, plan
from remanence.compress.quant_noise import quant_noise, remove_quant_noise
from remanence.compress.quantised import Quantised
from remanence.compress.quantised_layer import Mode, QuantisedLayer
from remanence.compress.quantizer import Metric, QuantisedRows, output_error, quantize_rows
from remanence.compress.reader import FileInfo
from remanence.compress.recipe import RECIPES
from remanence.compress.size import Size, size
from remanence.compress.stored import as_stored
from remanence.compress.target import bias_correction, teacher_target

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
