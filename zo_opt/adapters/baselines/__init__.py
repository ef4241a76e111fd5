"""Adapters that only a comparison needs, each as short as its equation."""
