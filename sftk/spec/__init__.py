"""Specs and recipes: strict YAML with places, schemas, resolution into graphs."""

from sftk.spec.graphs import load_graph

__all__ = ["load_graph"]
