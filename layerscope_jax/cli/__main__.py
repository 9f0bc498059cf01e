from layerscope_jax.cli import layerscope

layerscope()
