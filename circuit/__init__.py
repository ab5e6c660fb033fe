"""From a transcoder to circuits: replacement, attribution, interventions."""
