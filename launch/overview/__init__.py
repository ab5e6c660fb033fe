"""Runs side by side: the list, the comparison, and the choice among them."""
