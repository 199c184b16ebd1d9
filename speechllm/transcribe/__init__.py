"""Recordings of any length and format to text.

    inputs -> blocks of audio -> segments at pauses (`pauses`) -> batches of segments of similar length, of several
    inputs (`segments`) -> a recognizer -> each input's segments together (`overlap`) -> files (`formats`, `output`)

A few batches of audio are held at a time, however long and however many the inputs are.
"""
