"""What is trained: MoKA adapters as a PEFT tuner, and the 4-bit base they stand on.

Importing this package registers MoKA with PEFT, so that `PeftModel.from_pretrained` reads saved MoKA adapters.
"""

from .base import BaseModelError, load_base
from .config import AdapterError, MokaConfig
from .dense import dense_weights
from .export import export_merged
from .kronecker import use_fused
from .layer import MokaLayer
from .linear import MokaLinear
from .model import MokaModel
from .registration import register

register()

__all__ = [
    "AdapterError",
    "BaseModelError",
    "MokaConfig",
    "MokaLayer",
    "MokaLinear",
    "MokaModel",
    "dense_weights",
    "export_merged",
    "load_base",
    "register",
    "use_fused",
]
