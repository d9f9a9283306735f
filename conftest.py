"""Modules that need Flower are not collected (their docstrings hold examples) where it is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["lightning_distopt/federated/*.py", "recipes/federated/*.py"]
