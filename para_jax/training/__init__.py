"""Training one adapter: loss, optimiser, the compiled step, checkpoints."""
