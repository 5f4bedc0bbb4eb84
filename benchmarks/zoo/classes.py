# SPDX-License-Identifier: Apache-2.0
"""Shrunk builders of every class of diffusers that attends over video, and the classes that have none.

The classes are found by looking into the installed diffusers, so one that a new version brings shows up as having no
builder yet. Builders stand in the files beside this one, by how a class turns a video into tokens.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from benchmarks.zoo import cog, conv, linear, wan
from benchmarks.zoo.case import BUILDERS, Builder, ModelCase

__all__ = ["BUILDERS", "IMAGE_OR_OTHER", "Builder", "ModelCase", "installed_classes", "without_builder"]

_MODULES = (cog, conv, linear, wan)
"""Imported for the builders that they enter."""

IMAGE_OR_OTHER = frozenset(
    {
        "AceStepTransformer1DModel",
        "AuraFlowTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "DiTTransformer2DModel",
        "DreamLiteTransformer2DModel",
        "DualTransformer2DModel",
        "ErnieImageTransformer2DModel",
        "Flux2Transformer2DModel",
        "Flux3Transformer2DModel",
        "FluxTransformer2DModel",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanImageTransformer2DModel",
        "Ideogram4Transformer2DModel",
        "Krea2Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "LongCatImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxMusic3RVQDepthDecoder",
        "MiniMaxMusic3Transformer1DModel",
        "NucleusMoEImageTransformer2DModel",
        "OmniGenTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "PixArtTransformer2DModel",
        "PriorTransformer",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
        "RFD4ProteinaTransformer",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "StableAudio3DiTModel",
        "StableAudioDiTModel",
        "T5FilmDecoder",
        "Transformer2DModel",
        "TransformerSpatioTemporalModel",
        "TransformerTemporalModel",
        "ZImageTransformer2DModel",
    }
)
"""Classes known to attend over images, sound or other things; or, as parts of U-Nets, along time alone."""


def installed_classes() -> list[str]:
    """The names of all models in ``diffusers.models.transformers``, exported or not, sorted."""
    import diffusers.models.transformers as package
    from diffusers.models.modeling_utils import ModelMixin

    found = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in inspect.getmembers(module, inspect.isclass):
            whole = issubclass(value, ModelMixin) or (
                name.startswith(("Transformer", "Dual")) and name.endswith("Model")
            )
            if whole and value.__module__ == module.__name__:
                found.add(name)
    return sorted(found)


def without_builder() -> list[str]:
    """The installed classes that nobody has looked at: no builder, and not known to be about something else."""
    known = {name for name, _ in BUILDERS} | IMAGE_OR_OTHER
    return [name for name in installed_classes() if name not in known]
