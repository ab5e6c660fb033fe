"""A local page that shows graphs and features."""
