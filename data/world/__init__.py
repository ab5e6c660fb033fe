"""The bundled world: a small language model whose right circuit is known."""
