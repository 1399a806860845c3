"""Callbacks for training loops, one module a framework: ``bntools.callbacks.keras``."""
