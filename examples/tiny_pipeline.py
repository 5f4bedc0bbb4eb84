# SPDX-License-Identifier: Apache-2.0
"""A video pipeline of diffusers, of two experts, with random weights, small enough for a CPU and for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

CALL = {"height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
"""What a call of it is given to take seconds: a grid of 3x12x16 tokens."""


def tiny_pipeline() -> Any:
    """The pipeline; of two steps, each expert makes one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "cat": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    experts = [
        WanTransformer3DModel(patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, **sizes)
        for _ in range(2)
    ]
    with torch.no_grad():
        for expert in experts:  # as the weights are, attention hardly moves the video
            for block in expert.blocks:
                block.scale_shift_table[:, 2] += 30
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.8,
    )
