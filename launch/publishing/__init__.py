"""A run made ready for others: a folder as the hub wants it, with a model card, uploaded when told to."""
