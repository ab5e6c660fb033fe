"""Crosslace beside other trainers, on the same rows in the same order: see `python -m benchmarks.peers --help`.

store -> rows.py      x.npy, y.npy [L, N, D], in the order in which our own training reads them
rows  -> ours.py, in_sparsify.py, in_llamascopium.py   one training each, in its program's own environment
weights -> measure.py  imported, then NMSE, FVU, L0, dead on held-out rows; KL and CE recovered with every MLP replaced
"""
