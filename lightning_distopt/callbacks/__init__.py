"""Callbacks that measure and report."""

from lightning_distopt.callbacks.communication_monitor import CommunicationMonitor

__all__ = ["CommunicationMonitor"]
