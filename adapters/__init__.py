"""What is trained: MoKA adapters as a PEFT tuner, and the 4-bit base they stand on.

Importing this package registers MoKA with PEFT, so that `PeftModel.from_pretrained` reads saved MoKA adapters.
"""

from .base import BaseModelError, load_base
from .config import AdapterError, MokaConfig
from .dense import dense_weights
from .export import export_merged
from .hotswap import hotswap_adapter
from .kronecker import use_fused
from .layer import MokaLayer, keep_float32
from .linear import MokaLinear
from .mixed import bit_plan
from .model import MokaModel
from .precision import BitPlan
from .registration import register

register()

__all__ = [
    "AdapterError",
    "BaseModelError",
    "BitPlan",
    "MokaConfig",
    "MokaLayer",
    "MokaLinear",
    "MokaModel",
    "bit_plan",
    "dense_weights",
    "export_merged",
    "hotswap_adapter",
    "keep_float32",
    "load_base",
    "register",
    "use_fused",
]
