"""Data in tar shards, behind a path or an address: written once, read through a cache on the node's disk."""
