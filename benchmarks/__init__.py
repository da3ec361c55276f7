"""Measurements on a GPU, and what they share with the tests: single modules and float64 references."""
