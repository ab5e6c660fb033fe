"""The bundled models and their texts, built on the spot."""
