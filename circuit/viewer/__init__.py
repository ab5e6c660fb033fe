"""A local page that shows graphs and features, keeps what people add to them, and steers the model that they are of."""

from .picture import render_graph_svg as render_graph_svg
from .runs import Runs as Runs
from .saved import save_page as save_page
from .saved import show_graph as show_graph
from .server import Viewer as Viewer
from .server import ViewSettings as ViewSettings
from .server import serve as serve
