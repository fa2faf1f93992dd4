"""jitmoe: a Mixture-of-Experts layer for fine-tuning on CPUs, with kernels compiled for your model's shapes."""

from jitmoe.build import build
from jitmoe.config import MoEConfig
from jitmoe.layer import MoELayer
from jitmoe.pack import safetensors_source

__all__ = ["MoEConfig", "MoELayer", "build", "safetensors_source"]
__version__ = "0.1.0"
