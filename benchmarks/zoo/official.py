# SPDX-License-Identifier: Apache-2.0
"""Builders of official repositories' own classes, from checkouts of them, shrunk to two layers.

They need `einops`, and what their repository needs besides where a stand-in is not said to stand for it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.zoo.case import ModelCase, randn
from benchmarks.zoo.checkouts import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT,
    WIDTH,
    Edits,
    OfficialCase,
    flash_attention,
    import_from,
    official,
    stand_in,
)
from rainfusion_compile.sparsity.layout import Grid


@official("stepfun-ai/Step-Video-T2V", "StepVideoModel", "SDPA")
def step_video(root: Path, grid: Grid) -> ModelCase:
    for package in ("xfuser", "imageio"):
        stand_in(package)
    bare = ("stepvideo", "stepvideo.modules")
    for name in ("blocks", "normalization"):
        copy = import_from(root, f"stepvideo.modules.{name}", bare)
        theirs = f"xfuser.model_executor.models.customized.step_video_t2v.{name}"
        stand_in(theirs, **vars(copy))
    module = import_from(root, "stepvideo.modules.model", bare)
    head = 128  # how many channels of it are turned by which axis is written in their file
    sizes = {"num_attention_heads": 2, "attention_head_dim": head, "in_channels": 4, "out_channels": 4}
    model = module.StepVideoModel(**sizes, num_layers=LAYERS, caption_channels=[24, 16], attention_type="torch")
    for name, parameter in model.named_parameters():  # which they leave as they come from the allocator
        if parameter.dim() > 1:
            parameter.detach().normal_(0, 0.1)
        else:
            parameter.detach().fill_(float("norm" in name and "weight" in name))
    time, height, width = grid
    inputs = {
        "hidden_states": randn(1, time, 4, height, width),
        "encoder_hidden_states": randn(1, 9, 24, seed=1),
        "encoder_hidden_states_2": randn(1, 5, 16, seed=2),
        "timestep": torch.tensor([0.5]),
        "encoder_attention_mask": torch.ones(1, 14, dtype=torch.int64),
        "return_dict": False,
    }
    return OfficialCase(model, inputs, grid, video=LAYERS)


def _hunyuan_video(root: Path, grid: Grid, edits: Edits) -> ModelCase:
    module = import_from(
        root,
        "hyvideo.modules.models",
        ("hyvideo", "hyvideo.modules"),
        {"hyvideo.modules.attenion": {'device="cuda"': "device=text_mask.device", **edits}},
    )
    positions = import_from(root, "hyvideo.modules.posemb_layers")
    axes, (time, height, width) = [8, 12, 12], grid
    model = module.HYVideoDiffusionTransformer(
        SimpleNamespace(text_states_dim=24, text_states_dim_2=16),
        hidden_size=WIDTH,
        heads_num=HEADS,
        mm_double_blocks_depth=1,
        mm_single_blocks_depth=1,
        rope_dim_list=axes,
        guidance_embed=True,
    )
    cos, sin = positions.get_nd_rotary_pos_embed(axes, grid, theta=256, use_real=True)
    inputs = {
        "x": randn(1, 4, time, 2 * height, 2 * width),
        "t": torch.tensor([500.0]),
        "text_states": randn(1, TEXT, 24, seed=1),
        "text_mask": (torch.arange(TEXT) < 9).long()[None],
        "text_states_2": randn(1, 16, seed=2),
        "freqs_cos": cos,
        "freqs_sin": sin,
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    return OfficialCase(model, inputs, grid, (0, TEXT), video=2)


@official("Tencent-Hunyuan/HunyuanVideo", "HYVideoDiffusionTransformer", "flash-attn, varlen")
def hunyuan_video(root: Path, grid: Grid) -> ModelCase:
    flash_attention()
    return _hunyuan_video(root, grid, {})


@official("Tencent-Hunyuan/HunyuanVideo", "HYVideoDiffusionTransformer", 'SDPA (mode "torch")')
def hunyuan_video_torch(root: Path, grid: Grid) -> ModelCase:
    return _hunyuan_video(root, grid, {'mode="flash"': 'mode="torch"'})


@official("Tencent-Hunyuan/HunyuanVideo", "HYVideoDiffusionTransformer", 'by hand (mode "vanilla")')
def hunyuan_video_vanilla(root: Path, grid: Grid) -> ModelCase:
    return _hunyuan_video(root, grid, {'mode="flash"': 'mode="vanilla"'})


@official(
    "Tencent-Hunyuan/HunyuanVideo-1.5",
    "HunyuanVideo_1_5_DiffusionTransformer",
    "SDPA",
    "SDPA with a mask of keys stands for their compiled `flex_attention`, inside their compiler-disabled function",
)
def hunyuan_video_15(root: Path, grid: Grid) -> ModelCase:
    one_rank = SimpleNamespace(sp_enabled=False, sp=1)
    transformers = "hyvideo.models.transformers"
    bare = ("hyvideo", "hyvideo.models", transformers, f"{transformers}.modules")
    sdpa = {
        "flex_attention(query, key, value, score_mod=score_mod)": (
            "F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask[:, None, None])"
        )
    }
    import_from(root, "hyvideo.commons", bare, {f"{transformers}.modules.attention": sdpa})
    stand_in("hyvideo.models.text_encoders.byT5", ByT5Mapper=None)
    stand_in("hyvideo.commons.parallel_states", get_parallel_state=lambda: one_rank)
    module = import_from(root, f"{transformers}.hunyuanvideo_1_5_transformer")
    model = module.HunyuanVideo_1_5_DiffusionTransformer(
        hidden_size=WIDTH,
        heads_num=HEADS,
        concat_condition=False,
        mm_double_blocks_depth=LAYERS,
        mm_single_blocks_depth=0,
        rope_dim_list=[8, 12, 12],
        text_states_dim=24,
        attn_mode="torch",
    )
    time, height, width = grid
    inputs = {
        "hidden_states": randn(1, 4, time, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "text_states": randn(1, TEXT, 24, seed=1),
        "text_states_2": None,
        "encoder_attention_mask": (torch.arange(TEXT) < 9).long()[None],
    }
    return OfficialCase(model, inputs, grid, (0, TEXT), video=LAYERS)


def _mochi(root: Path, grid: Grid, mode: str, batch: int = 1) -> ModelCase:
    joint = "genmo.mochi_preview.dit.joint_model"
    half = {"torch.bfloat16": "torch.float32"}
    edits = {
        "genmo.lib.attn_imports": {"torch.cuda.get_device_properties(0).major >= 9.0": "False"},
        f"{joint}.temporal_rope": half,
        f"{joint}.asymm_models_joint": {
            **half,
            "EFFICIENT_ATTENTION": "MATH",  # of the pooled text, which a CPU has no other kernel for
            "assert mlp_hidden_dim_x == int(1536 * 8)": "",
        },
    }
    module = import_from(root / "src", f"{joint}.asymm_models_joint", edits=edits)
    (time, height, width), words = grid, 9
    model = module.AsymmDiTJoint(
        depth=LAYERS,
        num_heads=HEADS,
        hidden_size_x=WIDTH,
        hidden_size_y=64,
        mlp_ratio_x=2.0,
        t5_feat_dim=32,
        t5_token_length=TEXT,
        attention_mode=mode,
        qk_norm=True,
        qkv_bias=False,
        timestep_scale=1000.0,
    )
    for name, parameter in model.named_parameters():  # which are read from a file, and else what memory held
        if "norm" in name and parameter.dim() == 1:
            parameter.detach().fill_(1.0)
    model.pos_frequencies.detach().normal_(0, 0.1)
    tokens = time * height * width
    mask = (torch.arange(TEXT) < words).expand(batch, -1)
    counted = torch.cat([torch.ones(batch, tokens, dtype=torch.bool), mask], 1)
    inputs = {
        "x": randn(batch, 4, time, 2 * height, 2 * width),
        "sigma": torch.full((batch,), 0.5),
        "y_feat": [randn(batch, TEXT, 32, seed=1)],
        "y_mask": [mask],
        "packed_indices": {
            "cu_seqlens_kv": (torch.arange(batch + 1) * (tokens + words)).int(),
            "max_seqlen_in_batch_kv": tokens + words,
            "valid_token_indices_kv": counted.flatten().nonzero().flatten(),
        },
    }
    return OfficialCase(model, inputs, grid, (0, words), video=LAYERS)


@official("genmoai/mochi", "AsymmDiTJoint", "SDPA")
def mochi(root: Path, grid: Grid) -> ModelCase:
    return _mochi(root, grid, "sdpa")


@official("genmoai/mochi", "AsymmDiTJoint", "flash-attn, varlen")
def mochi_flash(root: Path, grid: Grid) -> ModelCase:
    flash_attention()
    return _mochi(root, grid, "flash")


@official("genmoai/mochi", "AsymmDiTJoint", "flash-attn, varlen, two videos packed by `gather`")
def mochi_batch(root: Path, grid: Grid) -> ModelCase:
    flash_attention()
    return _mochi(root, grid, "flash", 2)


def _open_sora(root: Path, grid: Grid, liger: bool) -> ModelCase:
    from benchmarks.zoo import liger_stand_in

    flash_attention()
    stand_in("liger_kernel.ops.rms_norm", LigerRMSNormFunction=liger_stand_in.RMSNorm)
    stand_in("liger_kernel.ops.rope", LigerRopeFunction=liger_stand_in.Rope)
    stand_in("colossalai.utils", get_current_device=None)
    stand_in("opensora.utils.ckpt", load_checkpoint=None)
    stand_in("opensora.registry", MODELS=SimpleNamespace(register_module=lambda name: lambda function: function))
    compiled = {'@torch.compile(mode="max-autotune-no-cudagraphs"': '@torch.compile(backend="eager"'}
    packages = ("opensora", "opensora.models", "opensora.models.mmdit", "opensora.utils", "opensora.acceleration")
    module = import_from(root, "opensora.models.mmdit.model", packages, {"opensora.models.mmdit.layers": compiled})
    config = module.MMDiTConfig(
        from_pretrained="",
        cache_dir="",
        in_channels=16,
        vec_in_dim=16,
        context_in_dim=24,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[8, 12, 12],
        theta=10_000,
        qkv_bias=True,
        guidance_embed=False,
        cond_embed=True,
        fused_qkv=False,
        use_liger_rope=liger,
    )
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in grid))
    inputs = {
        "img": randn(1, len(places), 16),
        "img_ids": places[None],
        "txt": randn(1, TEXT, 24, seed=1),
        "txt_ids": torch.zeros(1, TEXT, 3),
        "timesteps": torch.tensor([0.5]),
        "y_vec": randn(1, 16, seed=2),
        "cond": randn(1, len(places), 16 + 4, seed=3),
    }
    return OfficialCase(module.MMDiTModel(config), inputs, grid, (TEXT, 0), video=2)


@official("hpcaitech/Open-Sora", "MMDiTModel", "flash-attn, rotary tables of sines and cosines")
def open_sora(root: Path, grid: Grid) -> ModelCase:
    return _open_sora(root, grid, liger=True)


@official("hpcaitech/Open-Sora", "MMDiTModel", "flash-attn, rotary matrices")
def open_sora_matrices(root: Path, grid: Grid) -> ModelCase:
    return _open_sora(root, grid, liger=False)


@official("meituan-longcat/LongCat-Video", "LongCatVideoTransformer3DModel", "flash-attn")
def longcat(root: Path, grid: Grid) -> ModelCase:
    flash_attention()
    bare = ("longcat_video", "longcat_video.modules")
    module = import_from(root, "longcat_video.modules.longcat_video_dit", bare)
    model = module.LongCatVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        hidden_size=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        caption_channels=24,
        mlp_ratio=2,
        adaln_tembed_dim=32,
        frequency_embedding_size=32,
        enable_flashattn2=True,
        cp_split_hw=[1, 1],
    )
    time, height, width = grid
    inputs = {
        "hidden_states": randn(1, 4, time, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, 1, TEXT, 24, seed=1),
        "encoder_attention_mask": (torch.arange(TEXT) < 9).long()[None, None, None],
    }
    return OfficialCase(model, inputs, grid, video=LAYERS)


@official("Lightricks/LTX-Video", "Transformer3DModel", "SDPA, two videos")
def ltx_video(root: Path, grid: Grid) -> ModelCase:
    bare = tuple(f"ltx_video{name}" for name in ("", ".models", ".models.transformers", ".utils"))
    module = import_from(root, "ltx_video.models.transformers.transformer3d", bare)
    patchifier = import_from(root, "ltx_video.models.transformers.symmetric_patchifier").SymmetricPatchifier(1)
    model = module.Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=24,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
        standardization_norm="rms_norm",
        qk_norm="rms_norm",
        positional_embedding_theta=10000.0,
        positional_embedding_max_pos=[20, 2048, 2048],
        timestep_scale_multiplier=1000,
    )
    tokens, places = patchifier.patchify(randn(2, 4, *grid))
    scale = torch.tensor([8 / 25, 32, 32])[:, None]  # seconds and pixels of a latent's place
    inputs = {
        "hidden_states": tokens,
        "indices_grid": places * scale,
        "encoder_hidden_states": randn(2, TEXT, 24, seed=1),
        "timestep": torch.full((2, 1), 0.5),
        "encoder_attention_mask": torch.ones(2, TEXT),
        "return_dict": False,
    }
    return OfficialCase(model, inputs, grid, video=LAYERS)
