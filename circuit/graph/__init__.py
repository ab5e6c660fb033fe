"""The graph itself: nodes, edges, influence, paths, supernodes."""
