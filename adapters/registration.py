"""Make MOKA a tuner type of the installed PEFT.

PEFT has no plug-in hook: `register_peft_method` accepts members of the enum `PeftType` only. The member is therefore
added at run time, which keeps every `config.peft_type.value` in PEFT and transformers working.
"""

import warnings

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "MOKA"
TESTED = ("0.21", "0.22")  # from the first, below the second: the versions whose own tests MoKA passes


def moka_type() -> PeftType:
    """The member `PeftType.MOKA`, added if it is not there."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
        member._sort_order_ = len(PeftType.__members__)  # pyright: ignore[reportAttributeAccessIssue]
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def register() -> None:
    """Register MoKA with PEFT; a second call changes nothing. Warns where this PEFT is outside the tested range.

    Raises:
        RuntimeError: this PEFT already has another tuner named MOKA.
    """
    from .config import MokaConfig
    from .model import MokaModel

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(moka_type())
    if known is MokaConfig:
        return
    if known is not None and known.__module__ == MokaConfig.__module__:  # imported anew, as notebooks do
        PEFT_TYPE_TO_CONFIG_MAPPING[moka_type()] = MokaConfig
        PEFT_TYPE_TO_TUNER_MAPPING[moka_type()] = MokaModel
        return
    if known is not None:
        raise RuntimeError(
            f"peft {peft.__version__} already has a tuner named MOKA ({known.__module__}.{known.__qualname__}), which "
            "is not krontune's: adapters of the two are not compatible. Install a peft that krontune was tested with: "
            f"pip install 'peft>={TESTED[0]},<{TESTED[1]}'"
        )
    if not Version(TESTED[0]) <= Version(peft.__version__) < Version(TESTED[1]):
        warnings.warn(
            f"krontune's MoKA was tested with peft >= {TESTED[0]}, < {TESTED[1]}, and peft {peft.__version__} is "
            "installed; saving, loading and merging may differ",
            stacklevel=2,
        )
    register_peft_method(name=NAME.lower(), config_cls=MokaConfig, model_cls=MokaModel)
