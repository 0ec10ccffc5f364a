"""Layers: weights plus one kernel call each. Model files in `pace_nb/models` are built from them.

Knows kernels, the KV cache's view of a batch, and tensor names relative to a layer. Does not know
config.json, a model's name, requests or the engine. Import a layer from its file (`from
pace_nb.layers.linear import Linear`).
"""
