"""Federated learning on Flower: an app on digits, a demonstration, a study."""
