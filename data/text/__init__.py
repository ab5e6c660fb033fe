"""Documents to token sequences: where text comes from, how it is cut, what is held out."""
