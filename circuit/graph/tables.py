"""A graph for other programs' tables: pandas and NetworkX, where they are installed."""

from importlib import import_module
from typing import Any

from ...data.errors import UserError
from .graph import Graph
from .text import node_text


def to_pandas(graph: Graph) -> tuple[Any, Any]:
    """Nodes and edges as two data frames; the edges' source and target are the nodes' index."""
    pandas = _module("pandas")
    columns = ("kind", "layer", "position", "index", "activation", "label")
    rows = [{name: getattr(node, name) for name in columns} for node in graph.nodes]
    nodes = pandas.DataFrame(rows, index=range(len(rows)), columns=list(columns))
    nodes["influence"] = graph.influence().tolist()
    ids = graph.row_ids
    listed = [(edges.source.tolist(), ids[edges.row].tolist(), edges.value.tolist()) for edges in graph.stored.edges()]
    source, target, weight = ([value for block in listed for value in block[i]] for i in range(3))
    return nodes, pandas.DataFrame({"source": source, "target": target, "weight": weight})


def to_networkx(graph: Graph) -> Any:
    """A directed graph whose nodes have what `Node` has, their influence and a text; whose edges have a weight."""
    found = _module("networkx").DiGraph(prompt=str(graph.metadata.get("prompt", "")))
    influence = graph.influence().tolist()
    for node in graph.nodes:
        found.add_node(node.id, **node._asdict(), influence=influence[node.id], text=node_text(graph, node))
    ids = graph.row_ids
    for edges in graph.stored.edges():
        ends = zip(edges.source.tolist(), ids[edges.row].tolist(), edges.value.tolist())
        found.add_weighted_edges_from(ends)
    return found


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed; `pip install {name}` adds it") from error
