"""Fused kernels for NVIDIA GPUs, in Pallas on Triton: tunables, and where they can be used.

`inputs_2d` is most of the memory traffic, so one kernel does all that needs it at once: a program
takes one query row, goes over it in blocks of keys, adds the pair term to the logits of all heads,
keeps a running softmax and sums the pair output (`pallas_triton_forward`). Kernels over tiles of
one head (`pallas_triton_tiles`) make the logits [Nq, H, Nk] before, and attention times values
after. One more is the output projection (`pallas_triton_projection`). The gradient
(`pallas_triton_vjp`) goes over `inputs_2d` once more, and writes its gradient meanwhile. Every sum
has a fixed order: results are the same bits in every run.

A pass over `inputs_2d` that makes the whole logits itself was tried: four query rows of a program,
which share what they read of keys, need 1.35 reads of `inputs_2d` in all instead of some 1.5, but
more registers than there are, and took 67 s to compile for an H200 where this takes 2 s. Rows one
after the other, each with its state in memory, would need no more registers. But the keys of all
heads are 2.6 times the bytes of a row of `inputs_2d`: by estimate, to read them from the L2 cache
once for eight rows takes nearly as long as the logits that it saves, and leaves too few programs
where N < 2000.

Pallas's Triton backend is deprecated in favour of Mosaic GPU, which needs Hopper or newer. Moving
there replaces the files `pallas_triton*.py` and nothing else: `attend`, `project`, `unsupported`
and `Config` are all that is used from outside, and they import Pallas when it is needed, not
before. The sums and their order can stay. What changes is how data moves: blocks of `inputs_2d`
come to shared memory by explicit asynchronous copies (TMA) with barriers in place of masked loads
and Triton's own pipelining; products become wgmma, whose least block is 64 rows where one query has
12 heads, so heads of several queries have to be stacked, or products made block-diagonal; TF32
products in three parts and the cuts of float32 into bfloat16 have to be written out; and there is
shared memory to keep the logits of a few queries in, with which the [Nq, H, Nk] arrays need not be
written at all.
"""
