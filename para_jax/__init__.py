"""para_jax: fine-tune and serve one frozen language model for many tenants with PARA adapters (arXiv:2502.01033)."""
