"""Foreign files, read and written: circuit-tracer folders, Neuronpedia graphs, SAELens transcoders."""
