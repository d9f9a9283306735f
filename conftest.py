"""Modules that need Flower are not collected (their docstrings may hold examples) where it is not installed."""

from importlib.util import find_spec

_NEED_FLOWER = [
    "lightning_distopt/federated/*.py",
    "recipes/federated/*",
    "benchmarks/federated.py",
    "tests/federated/toy.py",
]
_NEED_FLOWER += ["tests/federated/deployment.py", "tests/federated/faulty_app/*"]
collect_ignore_glob = [] if find_spec("flwr") else _NEED_FLOWER
