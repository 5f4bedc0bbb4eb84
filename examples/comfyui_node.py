# SPDX-License-Identifier: Apache-2.0
"""A node for ComfyUI that compiles a video model by rainfusion. Copy this file into ``ComfyUI/custom_nodes``.

ComfyUI's own compile node offers Inductor and CUDA graphs alone; this one hands over another backend in the same way.
Put it between the loader of the model and the sampler. A model is compiled when it is first sampled, and again for
another size of video.
"""

from __future__ import annotations

from typing import Any

from rainfusion_compile.options import PRESETS


def _without_transformer_options(guards: list[Any]) -> list[bool]:
    """ComfyUI changes these at every step, and no graph depends on what is changed: as its own node has it."""
    return ["transformer_options" not in guard.name for guard in guards]


class RainFusionCompile:
    """MODEL to MODEL, whose diffusion model is compiled."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compile"
    CATEGORY = "model/compile"
    DESCRIPTION = "Sparse attention over video: faster from about ten thousand tokens on."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # ComfyUI asks for this name
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (
                    list(PRESETS),
                    {"default": "balanced", "tooltip": "how far the output of attention may err"},
                ),
                "dense_steps": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "noisiest share that stays dense",
                    },
                ),
            }
        }

    def compile(self, model: Any, preset: str, dense_steps: float) -> tuple[Any]:
        """A copy of ComfyUI's ``ModelPatcher`` that samples with the compiled model."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        options = {"preset": preset, "dense_steps": dense_steps, "guard_filter_fn": _without_transformer_options}
        set_torch_compile_wrapper(model=model, backend="rainfusion", options=options)
        return (model,)


NODE_CLASS_MAPPINGS = {"RainFusionCompile": RainFusionCompile}
NODE_DISPLAY_NAME_MAPPINGS = {"RainFusionCompile": "Compile with RainFusion"}
