"""Searches over the language-model seam (`speechllm.llm`)."""

from speechllm.decode.greedy import greedy_search

__all__ = ["greedy_search"]
