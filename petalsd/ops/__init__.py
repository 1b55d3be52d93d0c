"""What models call: each op in plain torch on any device, by the CPU's kernels, or by those of a GPU.

Symbols in shapes: ``T`` tokens of a batch, ``R`` rows, ``B`` sequences of a dense pass, ``n`` tokens of each,
``H`` query heads, ``Hkv`` KV heads, ``D`` head size, ``M`` hidden size, ``P`` tokens per page, ``N`` physical
pages, ``C`` context tokens of a row, ``L`` context tokens gathered for a group of rows.
"""
