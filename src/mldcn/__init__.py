"""Masked Low-Rank Deep & Cross Networks, and the ranking pipeline around them."""

__version__ = "0.1.0"
