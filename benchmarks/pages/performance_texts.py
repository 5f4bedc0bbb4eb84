# SPDX-License-Identifier: Apache-2.0
"""What ``docs/performance.md`` says around its tables; figures go into the braces."""

HEAD = """\
# Performance on an {gpu}

Written by `benchmarks/pages/performance_page.py` from the figures in [benchmarks/results](../benchmarks/results). Do
not edit: run the benchmarks, then `make performance`.

Times are medians unless it says otherwise. Speed-ups are over the fastest dense kernel of the same run, and include
the ARM and everything else that a call costs. Data is structured or random, never zeros. *Density* is what was really
computed: kept token pairs over all token pairs. *Efficiency* is the speed-up over 1 / density, the speed-up that the
dropped work would give a kernel that works as fast as the dense one; over 1, ours works faster than that.

Figures from before 2026-11-27 are older than samples of keys: windows stood alone, the ARM chose by recall and read
queries and keys only.

{flash_attention_3}
"""

ATTENTION = """\
Heads take the spatial, temporal and textural pattern in turn, at one sparsity (where some stayed dense, they were left
to the ARM, by recall, on queries and keys made for a pattern). Times are of an eager call with a cold L2 cache,
launches included (`triton.testing.do_bench`). *Sparse* is what a model calls: the ARM, then attention.
"""

DENSE = """\
**Dense kernels of the same run**, once for each shape, and our kernel with every head dense, which is what heads
that no pattern serves cost. *Ours / best* is its time over that of the fastest kernel.
"""

FLEX = """\
**FlexAttention with the same block mask.** PyTorch's own block-sparse kernel, compiled, computes exactly the token
pairs that the ARM chose for ours. It gets its tensors already in block order, padded so that no bounds need
checking, its mask ready, and the fastest of several kernel options (found in this run or, if it says so below, in an
earlier one); none of this is timed. *Difference* is the
largest between the two outputs. (A whole call and the sum of its parts, measured one by one, differ by
up to {noise:.0%} here: that much, times vary.){note}
"""

ARM = """\
**The ARM** is short. Its share of dense attention is taken from its time on the GPU (replays of a CUDA
graph); an eager call of it may also wait for Python. *Whole call* is the ARM with attention, eager and as a CUDA
graph, the latter where launches could matter.
"""

ARM_DEFAULT = """\
That is with three candidates. At the default options there are more, and some select key blocks, so that the ARM has to
find out which ones its samples would. From {first:,} tokens on it reads one key of two, from {second:,} on one of four;
where more tokens stand beside *one key of* 1, that was measured before it did.
"""

PATTERNS = """\
All heads take one candidate of the default options, or all stay dense. Attention alone, without the ARM; each head
draws samples and selects blocks of its own, as in users' models.
"""

MASKS = """\
In {dtype}. A bool mask hides {hidden_keys} keys: the last ones, as padding of text does, or the first ones.
*Dense* is the fastest kernel with that mask, and without one; the speed-up and the ARM's share are given over either.
*Sparse* is a whole call. Our kernels look at the mask from the first key on that it hides.
"""

INT8 = """\
`precision="int8"` multiplies queries and keys as 8-bit integers. Whole calls, the ARM and the rounding of keys in both;
*kernel* is attention alone, keys rounded. Sparsity 0: all heads dense. *Difference*: of the output from the one in
bfloat16, on random tensors; [quality](quality.md) has that of trained models. Dense attention in the same process:
{dense}.
"""

FLOAT32 = """\
PyTorch's only fused kernel for float32 is the memory-efficient one. Ours multiplies TF32 parts of each number on the
tensor cores ("tf32x3"), which keeps float32's precision: see the errors.
"""

ERRORS = """\
**Errors.** Relative L2 error at full size, sparsity {sparsity:g}, on {rows} query rows of each of {heads} heads, one of
each pattern: of dense kernels against dense attention in {reference}, of the sparse output against the same under the
block mask. The ratios are ours over the baseline kernel's. The worst is **{worst:.2f}**; more than {limit:g}
fails the benchmark.
"""

SCALING = """\
{heads} heads of {head_dim}, no text; otherwise as above, but of dense kernels only the two that tend to be fastest.
Small grids cannot be as sparse as asked: the first frame is always kept, and blocks cover more of each frame. An eager
call on few tokens takes as long as Python takes to launch it, which is measured with an idle GPU (*CPU's time*) and
depends on the CPU and what else it does; `inductor_mode="reduce-overhead"` (CUDA graphs) takes that away. By default,
attention over fewer than {min_tokens:,} tokens (`min_tokens`) stays dense in compiled models.
"""

RANDOM = """\
Block masks without structure, at the shape for which [{source}]({url}) published figures of its `{kernel}` kernel
on an {gpu}: {tokens:,} tokens, {heads} heads of {head_dim}, blocks of {block} x {block}, {kept_blocks} of
{blocks:,} key blocks kept for each query block and head, at random. Theirs is the time they published, on their
machine; we did not run it. Ours is the attention operator alone, without ARM; query blocks of {block} go to the
portable kernel, not to the one for Hopper. TFLOP/s count the kept work.
"""

WHOLE = """\
One forward of unmodified diffusers models, `torch.compile(model, backend="rainfusion")` against Inductor with the
fastest dense attention. *Attention's share* is that of video self-attention in the dense forward; *Amdahl's limit*
is the speed-up of the whole forward if attention took its new time and all else its old, and *reached* is the
measured speed-up over that. What attention and the ARM take is from one profiled forward of each side, so that
*reached* can also come out over 100 %. *Block by block*: both sides by diffusers' `compile_repeated_blocks`; the grid
is read off the rotary tables that blocks are handed. Over few tokens a forward takes as long as the CPU takes to launch
it, and what that takes differs between machines, and from one minute to the next on shared ones. In rows from before
2026-11-28 the ARM is its probe and its choice alone.
"""

UNMEASURED = [
    "What sparsity does to the quality of videos: see [quality.md](quality.md).",
    "Any GPU but those named above. Several GPUs: see [scaling.md](scaling.md).",
    "On a GPU: head dims and dtypes that are not in the tables, and fewer than 4k tokens. These may be slower than "
    "dense attention.",
    "Block-sparse kernels of other packages.",
    "Training: sparse attention has no backward pass.",
]
