"""Checkpoints of other trainers, read on a CPU without the framework that wrote them: one layout a
file, one interface.

`trained_state` is the interface, `layouts` finds the reader of a folder. Pickles go through
`inert_pickle`, which builds nothing but plain data. Imports nothing of the other rooms but
rl_training.
"""
