"""Trains image classifiers on folders and archives of any size: `flash-wtconv train`.

In the order of a run: `settings` says what is wanted, `sources` and `loading` bring images,
`augment` changes them on the device, `optimizers` and `steps` learn, `saving` keeps checkpoints,
`reports` tells of the run, and `trainer` ties them together. `evaluation` uses what was learnt.
"""
