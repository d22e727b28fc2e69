"""Other quantizers beside ours. `*_quantize.py` and `gptqmodel_solver.py` run in the peers' own environments and import nothing
of ours; `environments.py` makes those environments."""
