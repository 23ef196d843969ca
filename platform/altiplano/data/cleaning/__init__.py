"""Cleaning: what is done to a text before it is tokenised, and which texts come twice."""
