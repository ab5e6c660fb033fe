"""How good a transcoder and its graphs are."""
