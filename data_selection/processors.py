"""Processors of images and text where torchvision is not installed.

transformers brings PIL image processors along, but the processors of Qwen2-VL and its kin insist on a video processor
too, and that needs torchvision.
"""

from typing import Any


def images_only(processor_class: Any, image_processor: Any, tokenizer: Any, **options: Any) -> Any:
    """A processor of a class that also takes videos, made without its video processor.

    Args:
        processor_class: such as `transformers.Qwen2VLProcessor`.
        image_processor: such as `Qwen2VLImageProcessorPil.from_pretrained(folder)`, to be imported from
            `transformers.models.qwen2_vl.image_processing_pil_qwen2_vl`.
        tokenizer: of the model.
        options: of the class, such as `chat_template`.
    """

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return ImagesOnly(image_processor, tokenizer, **options)
