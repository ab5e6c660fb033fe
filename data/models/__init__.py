"""Language models and their families: loading, where layers and norms stand, attention sinks."""
