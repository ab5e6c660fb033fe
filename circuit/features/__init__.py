"""What a feature is: examples, dashboards, labels, concepts."""
