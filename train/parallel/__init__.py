"""Many processes as one: collectives, the mesh, what ranks exchange."""
