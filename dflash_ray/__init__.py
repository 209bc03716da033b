"""Lossless speculative decoding with DFlash drafters, as a distributed Ray Serve application.

A request goes gateway -> router -> target and drafter and back; each of the four is a process and a folder here.
"""

__version__ = "0.1.0"
