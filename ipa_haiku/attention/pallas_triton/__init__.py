"""Fused kernels for NVIDIA GPUs, in Pallas on Triton.

`inputs_2d` is most of the memory traffic, so one kernel does all that needs it at once: a program
takes one query row, goes over it in blocks of keys, adds the pair term to the logits of all heads,
keeps a running softmax and sums the pair output. The gradient goes over `inputs_2d` once more, and
writes its gradient meanwhile (`pair_rows`). Kernels over tiles of queries and keys of one head make
the logits [Nq, H, Nk] before (`tiles`), and sums over keys and over queries after (`sums`).
`forward` and `vjp` put them together. Every sum has a fixed order: a compiled program gives the
same bits in every run.

`core` is the entry, `config` has the tunables, and `device` tells where the kernels can run; these
three import Pallas when it is needed, not before. This file imports nothing: `Options` hold a
`KernelConfig`, and the kernels are called with `Options`.

A pass over `inputs_2d` that makes the whole logits itself was tried: four query rows of a program,
which share what they read of keys, need 1.35 reads of `inputs_2d` in all instead of some 1.5, but
more registers than there are, and took 67 s to compile for an H200 where this takes 2 s. Rows one
after the other, each with its state in memory, would need no more registers. But the keys of all
heads are 2.6 times the bytes of a row of `inputs_2d`: by estimate, to read them from the L2 cache
once for eight rows takes nearly as long as the logits that it saves, and leaves too few programs
where N < 2000. The output projection as a kernel, which saves a copy of the features, was estimated
to take 30 us longer than XLA's product.

Pallas's Triton backend is deprecated in favour of Mosaic GPU, which needs Hopper or newer. Moving
there replaces `common`, `tiles`, `sums` and `pair_rows`; the sums and their order can stay. What
changes is how data moves: blocks of `inputs_2d` come to shared memory by explicit asynchronous
copies (TMA) with barriers in place of masked loads and Triton's own pipelining; products become
wgmma, whose least block is 64 rows where one query has 12 heads, so heads of several queries have
to be stacked, or products made block-diagonal; TF32 products in three parts and the cuts of float32
into bfloat16 have to be written out; and there is shared memory to keep the logits of a few queries
in, with which the [Nq, H, Nk] arrays need not be written at all.
"""
