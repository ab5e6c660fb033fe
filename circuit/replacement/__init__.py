"""The language model with its MLPs replaced, and interventions on it."""
