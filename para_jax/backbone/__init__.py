"""The frozen Transformer: one Flax NNX decoder for all families, and how its weights are read."""
