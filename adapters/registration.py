"""Make MOKA a tuner type of the installed PEFT.

PEFT has no plug-in hook: `register_peft_method` accepts members of the enum `PeftType` only. The member is therefore
added at run time, which keeps every `config.peft_type.value` in PEFT and transformers working.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "MOKA"


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
    """Register MoKA with PEFT; a second call changes nothing.

    Raises:
        RuntimeError: this PEFT already has another tuner named MOKA.
    """
    from .config import MokaConfig
    from .model import MokaModel

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(moka_type())
    if known is MokaConfig:
        return
    if known is not None:
        import peft

        raise RuntimeError(
            f"peft {peft.__version__} already has a tuner named MOKA ({known.__module__}.{known.__qualname__}), which "
            "is not krontune's: adapters of the two are not compatible. Install a peft that krontune supports "
            "(pip install krontune states the range)."
        )
    register_peft_method(name=NAME.lower(), config_cls=MokaConfig, model_cls=MokaModel)
