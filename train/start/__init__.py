"""Where training begins: random weights, the MLPs' own neurons, another run."""
