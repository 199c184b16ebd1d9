"""Recordings of any length and format to text."""
