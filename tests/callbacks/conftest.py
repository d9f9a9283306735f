"""The fits of the callback tests are those of the strategy tests."""

from tests.strategies.conftest import _local_network  # noqa: F401  # a fixture
