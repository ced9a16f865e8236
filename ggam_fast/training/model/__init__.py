"""Backbone, head, files of weights and cached feature maps."""
