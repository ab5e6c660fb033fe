"""The verbs, sweeps, clusters and reports."""
